"""Alembic's command line on the database that RATCHET_DATABASE_URL names, for a checkout and an installed wheel alike.

python -m migrations upgrade head
python -m migrations check
python -m migrations revision --autogenerate -m "what changes"
"""

from alembic.config import CommandLine

from service.settings import get_settings
from service.store.session import alembic_config


def main() -> None:
    command_line = CommandLine(prog="python -m migrations")
    options = command_line.parser.parse_args()
    if not hasattr(options, "cmd"):
        command_line.parser.error("name a command, for example: upgrade head")
    command_line.run_cmd(alembic_config(get_settings().sql_url), options)


if __name__ == "__main__":
    main()
