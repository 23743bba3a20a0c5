"""The dashboard: files without a build step that ask the HTTP API as any other client does."""
