"""`bandpo compare` and `bandpo lab`: objectives compared over paired seeds, and single experiments."""
