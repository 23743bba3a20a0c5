"""`python -m service`: only the API, at RATCHET_HOST and RATCHET_PORT. `ratchet up` also starts Redis and a worker."""

import uvicorn

from service.app import create_app
from service.edge.protocol import BoundedHttp
from service.validation.environment import settings_or_exit

STREAMS_MAY_LAST_S = 3  # open event streams when the API stops; clients reconnect


def main() -> None:
    settings = settings_or_exit()
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        http=BoundedHttp,
        log_config=None,  # ours, set up when the application starts
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=STREAMS_MAY_LAST_S,
    )


if __name__ == "__main__":
    main()
