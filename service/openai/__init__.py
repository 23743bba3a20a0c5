"""OpenAI's API for completions and chats: a translation onto `sample` operations of the project's samplers."""
