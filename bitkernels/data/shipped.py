"""The model that ships with the package, and text that it was not trained on."""

from pathlib import Path

from bitkernels.data.text import shipped_text

SHIPPED_MODEL = Path(__file__).parent / "bi-mamba-22m.safetensors"

# The chapters of the shipped text that are in the validation and test splits of the model's corpus.
_UNSEEN = (
    "Genesis 5", "Exodus 13", "Leviticus 14", "Leviticus 18", "Leviticus 22", "Deuteronomy 18", "Joshua 7", "Joshua 12",
    "2 Samuel 8", "2 Kings 22", "1 Chronicles 25", "2 Chronicles 30", "Job 27", "Psalms 36", "Psalms 145", "Psalms 149",
    "Proverbs 25", "Isaiah 24", "Isaiah 48", "Isaiah 56", "Ezekiel 24", "Jonah 4", "Zechariah 1", "Zechariah 13",
    "Matthew 27", "Luke 9", "John 19", "1 Timothy 6", "Revelation 3", "Revelation 7", "Revelation 8",
)  # fmt: skip


def shipped_model() -> Path:
    """The packed file of the model that ships; README.md beside it says what it was trained on.

    Raises ValueError where this installation holds none.
    """
    if not SHIPPED_MODEL.is_file():
        raise ValueError(f"{SHIPPED_MODEL}: no model ships with this installation; name a checkpoint")
    return SHIPPED_MODEL


def shipped_chapters() -> tuple[str, str]:
    """Chapters of the shipped text that the shipped model may have read, and those that it did not.

    In the form of its training text: no headings, verses in one paragraph.
    """
    seen, unseen = [], []
    for chapter in shipped_text().strip("\n").split("\n\n"):
        heading, *verses = chapter.split("\n")
        (unseen if heading in _UNSEEN else seen).append(" ".join(verses))
    return "\n\n".join(seen) + "\n\n", "\n\n".join(unseen) + "\n\n"
