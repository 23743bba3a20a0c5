"""The `ratchet` command. It speaks HTTP through ratchet_client, like any other program."""


def app() -> None:
    """Run the command. Ctrl-C while its modules are still being loaded ends it as quietly as later."""
    try:
        from service.cli.main import app as command

        command()
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # exits.INTERRUPTED, which may not be loaded
