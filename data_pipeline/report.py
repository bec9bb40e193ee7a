"""What became of every file and every document of a preparation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from data_pipeline.corpus import describe_missing_field


@dataclass(frozen=True)
class PrepareReport:
    """What became of every document: ``documents_in == documents_train + documents_heldout + rejected``."""

    documents_in: int
    documents: dict[str, int]  # by split
    tokens: dict[str, int]  # by split, without end marks
    shards: dict[str, int]  # by split
    rejected: dict[str, int]  # documents by reason
    text_bytes: int  # UTF-8 bytes of the documents that were kept
    files: int = 0  # that the sources mean
    left_out: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # by reason: {"files": count, "names": [first, ...]}
    text_fields: list[str] = field(default_factory=list)  # of records that have not the field asked for
    manifests: dict[str, str] = field(default_factory=dict)  # path by split
    seconds: float = 0.0

    @property
    def documents_out(self) -> int:
        return sum(self.documents.values())

    @property
    def documents_rejected(self) -> int:
        return sum(self.rejected.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self, text_field: str = "text") -> str:
        """The report as a table for people."""
        lines = [f"files read          {self.files:>14,}"] if self.files else []
        for reason, entry in self.left_out.items():
            lines.append(f"  {reason:<19} {entry['files']:>12,}   left out: {describe_names(entry)}")
        lines.append(f"documents read      {self.documents_in:>14,}")
        for split, path in self.manifests.items():
            documents, tokens, shards = self.documents[split], self.tokens[split], self.shards[split]
            lines.append(f"  to {split:<16} {documents:>12,}   {tokens:,} tokens in {shards} shards: {path}")
        lines += [f"  {reason:<19} {count:>12,}   rejected" for reason, count in self.rejected.items()]
        if self.rejected.get("missing_field"):
            lines.append(f"note: {describe_missing_field(text_field, self.text_fields)}")
        return "\n".join(lines)


def describe_names(entry: dict[str, Any]) -> str:
    """The first names of files left out for one reason, with dots if there are more."""
    names = entry["names"]
    return ", ".join(names) + (", ..." if entry["files"] > len(names) else "")
