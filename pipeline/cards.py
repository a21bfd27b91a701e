"""What cards of caches and of models share: the file that the Hugging Face hub reads, and its table of facts."""

from collections.abc import Mapping

FILE = "README.md"


def fact_table(facts: Mapping[str, str]) -> str:
    """A Markdown table of two columns without titles."""
    cells = [f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in facts.items()]
    return "\n".join(["| | |", "|---|---|", *cells])
