"""The one exception that people are meant to read."""


class Failure(Exception):  # noqa: N818 (it is shown to people by its text, never by its name)
    """Something the user can mend: one sentence that names the thing and the mend.

    ``everywhere`` tells that each process of the run raises the same, so that one may speak for
    all of them.
    """

    def __init__(self, sentence: str, *, everywhere: bool = False) -> None:
        super().__init__(sentence)
        self.everywhere = everywhere
