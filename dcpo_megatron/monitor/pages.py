"""HTML pages from the templates in ``templates/``: each one file, with its pictures inside.

    base.html <-- run.html      dcpo report; see run_page.py
              <-- blocks.html   dcpo compare; see comparison/study_page.py
    parts.html                  what several pages show

Whatever a template is given is escaped.
"""

from __future__ import annotations

import base64

import jinja2

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("dcpo_megatron.monitor"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def render(template: str, **values: object) -> str:
    """The page of ``template`` with ``values`` in it. Raises jinja2.UndefinedError: a name that it was not given."""
    return _TEMPLATES.get_template(template).render(values) + "\n"


def picture(kind: str, data: bytes) -> str:
    """The source of an <img> that holds the picture itself; ``kind``: "png" or "svg+xml"."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
