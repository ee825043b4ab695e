"""Docstrings as they are written: `AdderConv` is code, and a link where jadder has the name.

What reStructuredText takes for markup and the docstrings mean as mathematics, |x - w| and
(*window, C, F), is text.
"""

import ast
import inspect
import re
import textwrap
from typing import Any

from docutils import nodes
from flax import nnx
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

import jadder

LOGGER = logging.getLogger(__name__)
MAYBE = "jadder_maybe"
"""Marks references that are allowed to lead nowhere."""

# An indented block after a paragraph; "a, b: what they are"; ``code``.
FORMULA = re.compile(r"^(\S.*\n)\n((?:    .*\n)+)", re.MULTILINE)
SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)
LITERAL = re.compile(r"``.+?``", re.DOTALL)


class Name(SphinxRole):
    """A name in single backticks; whatever jadder does not have stays plain code."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        return [_maybe(self.env, self.text, self.rawtext)], []


def _maybe(env: BuildEnvironment, text: str, rawtext: str = "") -> nodes.Element:
    literal = nodes.literal(rawtext or text, text, classes=["name"])
    target = text.strip().removesuffix("()")
    if not all(part.isidentifier() for part in target.split(".")):
        return literal
    return pending_xref(
        rawtext,
        literal,
        refdomain="py",
        reftype="obj",
        reftarget=target,
        refdoc=env.docname,
        refspecific=True,
        **{MAYBE: True, **env.ref_context},
    )


class LinkCode(SphinxPostTransform):
    """Makes links of code in running text that is the name of something, `jadder.quantize`."""

    default_priority = 5

    def run(self, **kwargs: Any) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            text = literal.astext()
            inside = literal.parent
            while inside is not None and not isinstance(inside, nodes.reference | nodes.title):
                inside = inside.parent
            if inside is None and text.startswith("jadder.") and "name" not in literal["classes"]:
                literal.replace_self(_maybe(self.env, text))


def _settle(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """What is not there: no fault in a docstring's name, nor in the type of another package.

    Anything else that is asked for as jadder's own is one, and ends a strict build. A module's
    name for something that the site has as `jadder.NAME` finds it there.
    """
    if node.get("refdomain") != "py":
        return None
    target = str(node["reftarget"])
    own = target.startswith("jadder.")
    name = target.rpartition(".")[2]
    python = env.domains.python_domain
    for other in (f"jadder.{name}", f"{target}.{name}"):
        if own and other in python.objects:
            node["refspecific"] = False
            return python.resolve_xref(
                env, node["refdoc"], app.builder, "obj", other, node, content
            )
    return content if node.get(MAYBE) or not own else None


def _signature_as_written(
    app: Sphinx, what: str, name: str, obj: Any, options: object, arguments: Any, result: Any
) -> tuple[str, str | None] | None:
    """Arguments as the source has them: `ArrayLike`, not the seven types that it stands for.

    NNX makes objects by a metaclass, whose own arguments are (*args, **kwargs).
    """
    function = obj.__init__ if what == "class" and issubclass(obj, nnx.Pytree) else obj
    function = inspect.unwrap(getattr(function, "__func__", function))
    if what not in ("class", "function", "method") or not inspect.isfunction(function):
        return None
    written = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(written, ast.FunctionDef)
    takes = [*written.args.posonlyargs, *written.args.args]
    if what != "function" and takes and takes[0].arg in ("self", "cls"):
        (written.args.posonlyargs or written.args.args).pop(0)
    returns = None if what == "class" or written.returns is None else ast.unparse(written.returns)
    return f"({ast.unparse(written.args)})", returns


def _as_text(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Escapes the mathematics of a docstring, outside of literals and examples."""
    before, attributes, after = "\n".join(lines).partition("Attributes:\n")
    before = FORMULA.sub(r"\1\n::\n\n\2", before)
    text, end = before + attributes + SEVERAL.sub(_one_by_one, after), 0
    parts = []
    for literal in LITERAL.finditer(text):
        parts += [_escape(text[end : literal.start()]), literal[0]]
        end = literal.end()
        if text[end : end + 1].isalpha():  # the s of more than one
            parts.append("\\ ")
    parts.append(_escape(text[end:]))
    lines[:] = "".join(parts).split("\n")


def _one_by_one(fields: re.Match[str]) -> str:
    """The entry of several attributes as one for each: Napoleon knows that of arguments only."""
    indent, names, text = fields.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))


def _escape(text: str) -> str:
    lines = text.split("\n")
    example = formula = False
    for i, line in enumerate(lines):
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        formula = line == "::" or (formula and (not line or line.startswith("    ")))
        if not (example or formula):
            lines[i] = re.sub(r"(?<!\\)[|*]", r"\\\g<0>", line)
    return "\n".join(lines)


def _all_are_there(app: Sphinx, env: BuildEnvironment) -> None:
    """Each public name has its place on the API pages."""
    python = env.domains.python_domain
    for name in jadder.__all__:
        places = (f"jadder.{name}", f"jadder.{name}.{name}")
        if not any(place in python.objects or place in python.modules for place in places):
            LOGGER.warning("docs/api has no jadder.%s", name)


def _is_no_field(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: object
) -> bool | None:
    """Passes over the fields of named tuples, of which Python says their numbers only."""
    return str(getattr(obj, "__doc__", "")).startswith("Alias for field number") or None


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_role("name", Name())
    app.add_post_transform(LinkCode)
    app.connect("missing-reference", _settle)
    app.connect("env-check-consistency", _all_are_there)
    app.connect("autodoc-skip-member", _is_no_field)
    app.connect("autodoc-process-signature", _signature_as_written)
    app.connect("autodoc-process-docstring", _as_text, priority=400)  # before napoleon
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
