"""The site: the README, these pages, the notebooks and the API reference, as they lie in the repository.

The source folder is the repository itself, so a link works on the site as it works on GitHub. Nothing is executed: a
notebook is shown with its committed outputs, which the tests compare.
"""

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

# The package's lazy names are imported here, because autodoc looks for them in the module's namespace.
import upstox_db_examples  # noqa: E402

for name in upstox_db_examples.__all__:
    getattr(upstox_db_examples, name)

project = "upstox_db_examples"
author = "the authors of upstox_db_examples"
release = version = metadata.version("upstox-db-examples")
html_title = project

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "site_code"]
root_doc = "README"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/**.md",
    "notebooks/*.ipynb",
    "benchmarks/*.md",
    "recipes/*.md",
    "upstox_db_examples/*/README.md",
]
exclude_patterns = [".*", "build", "dist", "tests", "**/.ipynb_checkpoints"]
templates_path = ["_templates"]

nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
autodoc_preserve_defaults = True
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "index.html"}
html_copy_source = False
html_show_sphinx = html_show_copyright = False
html_domain_indices = False
pygments_style, pygments_dark_style = "friendly", "monokai"

# The README is the front page. GitHub would show this list of pages as code, so it is added here.
CONTENTS = """
```{toctree}
:hidden:
:caption: Use it

Start here <self>
docs/choosing
docs/token_life
docs/account
docs/command
docs/keys
docs/copying
upstox_db_examples/minimal/README
recipes/README
```

```{toctree}
:hidden:
:caption: Notebooks
:glob:

notebooks/*
```

```{toctree}
:hidden:
:caption: In production

docs/sqlite
docs/postgresql
docs/mongodb
docs/hybrid
docs/scaling
docs/poolers
docs/backup
docs/upgrading
```

```{toctree}
:hidden:
:caption: Reference
:maxdepth: 2

docs/api/index
docs/guide
benchmarks/README
docs/design
docs/servers
CONTRIBUTING
CHANGELOG
```
"""


def add_contents(_: object, docname: str, source: list[str]) -> None:
    if docname == root_doc:
        source[0] += CONTENTS


def setup(app: Any) -> None:
    app.connect("source-read", add_contents)
