"""`tinydiff` and `python -m tinydiff`: listen for Ctrl-C, then import the command line, which takes a while."""

from tinydiff import interrupts


def main() -> None:
    """The console script. Exits by SystemExit, after an interrupt at once."""
    try:
        interrupts.listen()
        from tinydiff.cli import main as command

        command()
    except KeyboardInterrupt:
        interrupts.leave()
    except SystemExit as stop:
        if interrupts.heard:
            interrupts.leave(stop.code if isinstance(stop.code, int) else interrupts.CODE)
        raise


if __name__ == "__main__":
    main()
