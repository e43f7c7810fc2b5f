"""The exception for requests that cannot be served."""


class Refused(Exception):
    """A request that cannot be served. ``retry_after`` is in seconds; the rest is as in OpenAI's errors."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after
