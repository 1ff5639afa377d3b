"""Search by meaning, in float32 and int8: python examples/sentence_search.py ["what to look for" ...]

The texts are the paragraphs of this project's own pages (README.md, docs/). all-MiniLM-L6-v2 embeds them; a query's
nearest texts are those with the largest cosine. Printed: the best texts of a few queries, in float32 and int8, how
many of the first ten the two share, texts and queries per second. Needs what examples/minilm needs.
"""

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).with_name("minilm")))
from run import model_folder

import edgeattn
import quant
from edgeattn import messages

ROOT = Path(__file__).resolve().parents[1]
QUERIES = ("how much memory does a board need", "which masks may I pass", "run it on a microcontroller",
           "my results differ between processors", "token after token with a cache")
EACH, FIRST, SHOWN = 12, 10, 72


def paragraphs() -> list[str]:
    """Prose of every page, its first EACH paragraphs, each behind the heading it stands under: no tables, no code."""
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        inside, heading, prose = False, "", []
        for block in page.read_text(encoding="utf-8").split("\n\n"):
            fences = block.count("```")
            if not inside and block.startswith("#"):
                heading = block.splitlines()[0].lstrip("# ")
            elif not inside and not fences and len(block) > 80 and block[0] not in "#|<!-: ":
                prose.append(f"{heading}: {' '.join(block.split())}")
            inside ^= fences % 2 == 1
        found += prose[:EACH]
    return found


def main() -> int:
    messages.show()
    began = time.perf_counter()
    try:
        model = edgeattn.from_pretrained(model_folder())
    except (ModuleNotFoundError, FileNotFoundError) as error:
        print(f"Cannot run: {error}")
        return 1
    texts, queries = paragraphs(), sys.argv[1:] or list(QUERIES)
    edgeattn.set_num_threads(1)
    print(f"{len(texts)} paragraphs of README.md and docs/")
    ranked = {}
    for name, form in {"float32": model, "int8": quant.quantize(model, scheme="dynamic")}.items():
        form.encode(queries[:1])  # compiles, where nothing is compiled yet
        start = time.perf_counter()
        index = form.encode(texts)
        middle = time.perf_counter()
        asked = np.concatenate([form.encode([query]) for query in queries])
        end = time.perf_counter()
        ranked[name] = asked @ index.T
        print(f"{name:8s} {len(texts) / (middle - start):5.0f} texts and "
              f"{len(queries) / (end - middle):5.0f} queries a second")
    shared = []
    for query, exact, coded in zip(queries, ranked["float32"], ranked["int8"], strict=True):
        first = [np.argsort(-cosines)[:FIRST] for cosines in (exact, coded)]
        shared.append(len(set(first[0]) & set(first[1])) / FIRST)
        print(f"\n{query}")
        for place in first[1][:2]:
            print(f"  {coded[place]:.3f} ({exact[place]:.3f} in float32)  {texts[place][:SHOWN]}...")
    print(f"\nOf the first {FIRST} in float32 {np.mean(shared):.0%} are among the first {FIRST} in int8.")
    print(f"Done in {time.perf_counter() - began:.1f} s.")
    return 0 if np.mean(shared) > 0.8 else 1


if __name__ == "__main__":
    sys.exit(main())
