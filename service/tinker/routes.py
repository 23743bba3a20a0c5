"""All routes of the Tinker wire."""

from service.tinker import clients, futures, runs, samplers, training

ROUTERS = (futures.router, samplers.router, training.router, clients.router, runs.router)
