"""The API under test: `python -m chaos.api` is `python -m service` with the points installed."""

from chaos import points
from service.__main__ import main

if __name__ == "__main__":
    points.install_rings()
    points.install_in_api()
    main()
