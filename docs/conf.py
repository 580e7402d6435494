"""The docs site: README.md and docs/*.md as they stand in the repository. `make docs` builds it.

Sphinx with MyST and furo, because all three are kept up and the pages search and link offline. Material for MkDocs is
marked inactive by its authors, and its successor Zensical was a beta (0.1.3) when this was written (November 2026).
"""

# --- navigation: a page that is not in it, or a link or an anchor that leads nowhere, fails the build ---

NAVIGATION = {
    "Begin": ["start", "own-data", "own-model", "own-sweep", "own-project"],
    "Choose": ["methods", "guide", "search"],
    "Read and use": ["results", "watching", "trust", "metrics", "use", "serving", "tracking"],
    "Data": ["data", "conversations", "documents"],
    "Machines": ["devices", "clusters", "containers", "storage", "scale"],
    "When something is wrong": ["troubleshooting", "recovery", "robustness"],
    "Reference": ["config", "options", "commands", "stages", "reruns"],
    "About": ["design", "glossary", "figures", "speed", "comparison"],
}
ALSO = ["config/README", "deploy/mlflow/README", "CONTRIBUTING", "CHANGELOG"]


def _navigation(_app, docname: str, source: list[str]) -> None:
    """Add the tables of contents to the first page, which GitHub shows without them."""
    if docname == root_doc:
        parts = {caption: [f"docs/{page}" for page in pages] for caption, pages in NAVIGATION.items()}
        parts["About"] += ALSO
        trees = [
            f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```"
            for caption, pages in parts.items()
        ]
        source[0] += "".join(trees)


def setup(app) -> None:
    app.connect("source-read", _navigation)


# --- Sphinx ---

project = "Temper"
root_doc = "README"
extensions = ["myst_parser"]
include_patterns = ["*.md", "docs/*.md", "config/*.md", "deploy/**.md"]
exclude_patterns = [".*", "results", "data", "site", "tests"]
myst_heading_anchors = 4
highlight_language = "none"  # of blocks that name none: commands and what they print
pygments_style = "tango"

html_theme = "furo"
html_title = "Temper"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
