"""What the Hub of the tests keeps: repositories of commits of files, and how it refuses what is not there."""

import hashlib
from dataclasses import dataclass, field


class Refusal(Exception):
    """An answer with an error status; `code` is what the client recognises an error by."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass(frozen=True)
class File:
    """A file of a commit, identified as Git or Git LFS does."""

    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """SHA-256 of the content, or SHA-1 of the Git blob."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """The commits of a repository, each a mapping from paths to files, and the names that point at them."""

    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, File]) -> str:
        """Let `ref` point at a new commit of `files`; returns its name."""
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid

    def resolve(self, revision: str) -> str:
        """The name of the commit that a branch, pull request or commit names."""
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid
