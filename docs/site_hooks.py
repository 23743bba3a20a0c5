"""What differs between the pages in the repository and the site: formulas become MathML, files outside docs/ become copies."""

import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"(?<=\]\()\.\./([^)#]+)(?=[)#])")
TYPED = {".py": "python", ".json": "json", ".ipynb": "json", ".yaml": "yaml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The site has a page for each file of the repository that a page in docs/ links; README.md is its first page."""
    pages = [page.content_string for page in files.documentation_pages()]
    for name in sorted({name for text in pages for name in OUTSIDE.findall(text)} - {"README.md"}):
        path = ROOT / name
        if path.is_dir():
            text = "\n".join(f"- `{each.name}`" for each in sorted(path.glob("*.py")))
        else:
            text = f"````{TYPED[path.suffix]}\n{path.read_text()}\n````"
        page = f"# `{name}`\n\n{text}\n"
        files.append(File.generated(config, f"source/{name}.md", content=page, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links to those pages, and formulas that browsers draw by themselves."""
    markdown = OUTSIDE.sub(lambda link: "index.md" if link[1] == "README.md" else f"source/{link[1]}.md", markdown)
    return re.sub(
        r"^```math\n(.*?)^```$",
        lambda fence: f'<p class="formula">{convert(fence[1].strip(), display="block")}</p>',
        markdown,
        flags=re.DOTALL | re.MULTILINE,
    )
