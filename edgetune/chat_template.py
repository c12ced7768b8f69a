"""Chat templates: the programs in Jinja that come with a model and render messages to its text.

They run in jinja2's immutable sandbox with the filters and globals that transformers gives them
(utils/chat_template_utils.py there), so a template renders here as it does there. The sandbox keeps a template away
from Python and from files; it does not stop one from burning time or memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import DataError, ModelError

if TYPE_CHECKING:
    import jinja2

__all__ = ["ChatTemplate"]


class ChatTemplate:
    """A compiled template. jinja2 is imported here and not before: most runs on a device need no template.

    Raises:
        ModelError: The template is damaged.
    """

    def __init__(self, source: str, folder: Path) -> None:
        import jinja2

        self.folder = folder
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"The chat template of {folder} is damaged, line {error.lineno}: {error}. Copy it again from the "
                "model's source."
            ) from error
        except Exception as error:  # the compiler runs constant expressions, and a deep one exhausts it
            raise ModelError(
                f"The chat template of {folder} cannot be compiled: {error}. Copy it again from the model's source."
            ) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text of the messages in `variables`.

        Raises:
            ModelError: The template reaches for what the sandbox forbids.
            DataError: The template refuses these messages.
        """
        import jinja2.exceptions

        try:
            return self._template.render(variables)
        except jinja2.exceptions.SecurityError as error:
            raise ModelError(
                f"The chat template of {self.folder} tries to leave its sandbox ({error}). Do not use these files."
            ) from error
        except Exception as error:  # a template may fail in any way a program can
            reason = str(error).encode("utf-8", "replace").decode() or type(error).__name__
            raise DataError(
                f"The chat template of {self.folder} refuses these messages: {reason}. "
                f"Their roles are {', '.join(str(m.get('role')) for m in variables['messages']) or 'none'}."
            ) from error


def _environment() -> jinja2.Environment:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks an assistant's words for a mask of transformers; here it is a plain block."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # jinja2's own filter escapes HTML, which no template of a model wants.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
