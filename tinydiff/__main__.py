"""`python -m tinydiff`."""

from tinydiff.cli import main

main()
