"""`python -m service.openapi` prints docs/openapi.json."""

import json

from service.app import create_app
from service.settings import Settings


def main() -> None:
    print(json.dumps(create_app(Settings()).openapi(), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
