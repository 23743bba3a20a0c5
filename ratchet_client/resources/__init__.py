"""The methods of `Ratchet`, one module a resource of the service."""
