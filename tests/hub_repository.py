"""The contents of the tests' Hub: repositories with commits of files, and the errors for what is missing."""

import hashlib
from dataclasses import dataclass, field


class Refusal(Exception):
    """An answer with an error status. The client recognises the error by its `code`."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass(frozen=True)
class File:
    """A file in a commit, with an id as in Git or Git LFS."""

    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """The SHA-256 of the content, or the SHA-1 of the Git blob."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """The commits of a repository, each a mapping from paths to files, and the references to them."""

    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, File]) -> str:
        """Makes `ref` point at a new commit of `files`, and returns the commit's name."""
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid

    def resolve(self, revision: str) -> str:
        """Returns the commit of a branch, pull request or commit name."""
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid
