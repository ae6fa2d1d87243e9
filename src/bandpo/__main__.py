"""`python -m bandpo`, also under `accelerate launch`."""

from bandpo.cli import main

raise SystemExit(main())
