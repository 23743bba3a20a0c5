"""One job on several devices of a machine: data parallel, one process a device."""
