"""An objective of a user, found by its import path."""

from bandpo import JS, Band, Objective

MINE = Objective(bounds=Band(JS, 0.02), name="mine")
NOT_ONE = Band(JS, 0.02)
