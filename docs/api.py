"Descriptions of the library's objects for Sphinx: signature, docstring, and nbdev's comment docs (docments) as parameters."
import ast
import dataclasses
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module

from fastcore.docments import docments

@dataclass(frozen=True)
class Entry:
    "One public object of the library."
    module:str # `llm_scratch.core`
    name:str # within the module: `UserError`, `Decoder.forward`
    page:str # the chapter that defines it

    @property
    def full(self)->str: return f"{self.module}.{self.name}"

    @property
    def value(self):
        "The object itself; a method as it stands in its class."
        *path,last = self.name.split(".")
        owner = import_module(self.module)
        for part in path: owner = getattr(owner, part)
        return inspect.getattr_static(owner, last)

    @property
    def summary(self)->str: return (inspect.getdoc(_function(self.value)) or "").split("\n")[0] if self.kind != "data" else ""

    @property
    def kind(self)->str:
        "The Sphinx directive that describes it."
        value = self.value
        if isinstance(value, type): return "exception" if issubclass(value, BaseException) else "class"
        if isinstance(value, (property, cached_property)): return "property"
        if isinstance(value, staticmethod): return "staticmethod"
        if isinstance(value, classmethod): return "classmethod"
        if not (inspect.isroutine(value) or hasattr(value, "__wrapped__") or isinstance(value, partial)): return "data"
        return "method" if "." in self.name else "function"

def public(name:str)->bool: return not name.startswith("_")

def is_patch(node:ast.AST)->bool:
    return any(getattr(d.func if isinstance(d, ast.Call) else d, "id", "") == "patch" for d in node.decorator_list)

def methods(node:ast.ClassDef)->list[str]:
    "The methods that a class body defines and describes."
    return [m.name for m in node.body if isinstance(m, ast.FunctionDef) and public(m.name) and ast.get_docstring(m)]

def defined(source:str)->list[str]:
    "Names of the public objects that a cell defines: functions, classes and their methods, `@patch` methods, constants."
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and public(node.name): names += [node.name, *(f"{node.name}.{m}" for m in methods(node))]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and public(node.name):
            names += [f"{c}.{node.name}" for c in _patched(node)] if is_patch(node) else [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [t.id for t in targets if isinstance(t, ast.Name) and public(t.id)]
    return names

def _patched(node:ast.FunctionDef)->list[str]:
    "The classes that a `@patch` function joins: the annotation of its first argument."
    return [c.strip() for c in ast.unparse(node.args.args[0].annotation).split("|")]

def _function(value):
    "The plain function behind a property or a method."
    if isinstance(value, property): return value.fget
    return value.func if isinstance(value, cached_property) else getattr(value, "__func__", value)

class _Shown:
    "A default value that prints as `text`."
    def __init__(self, text:str): self.text = text
    def __repr__(self)->str: return self.text

def _default(value):
    "`value`, or something that prints shorter than `<function f at 0x…>`."
    if callable(value): return _Shown(getattr(value, "__name__", "..."))
    return _Shown("...") if repr(value).startswith("<") else value

def _has_signature(value)->bool:
    "Is there a signature of our own to show? A class that inherits its `__init__` has none."
    return not isinstance(value, type) or "__init__" in vars(value)

def signature(entry:Entry)->str:
    "The call with names and defaults; types stand in the table of parameters."
    if entry.kind in ("data", "property") or not _has_signature(entry.value): return ""
    sig = inspect.signature(_function(entry.value))
    params = [p.replace(annotation=p.empty, default=_default(p.default) if p.default is not p.empty else p.empty)
              for n,p in sig.parameters.items() if n not in ("self", "cls")]
    return str(inspect.Signature(params))

def type_text(annotation)->str:
    "`annotation` as one would write it, without the modules that everybody knows and without what `Annotated` adds."
    if hasattr(annotation, "__metadata__"): annotation = annotation.__origin__
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:llm_scratch\.\w+|pathlib|collections\.abc|typing|datasets\.\w+|numpy)\.(?=[A-Za-z])", "", text)

def fields(entry:Entry, prose:Callable[[str], str])->list[str]:
    "Sphinx's field list of the parameters and of what is returned."
    value = _function(entry.value)
    if entry.kind in ("data", "property") or not _has_signature(value): return []
    lines,docs = [],docments(value, full=True)
    for name,doc in docs.items():
        help = next((h for m in getattr(doc.anno, "__metadata__", ()) if (h := getattr(m, "help", None))), "") # an option of the command line
        known = doc.anno is not inspect.Parameter.empty and doc.anno is not None
        if name == "return":
            if doc.docment: lines.append(f":returns: {prose(doc.docment)}")
            if known and (doc.docment or entry.kind != "class"): lines.append(f":rtype: {type_text(doc.anno)}")
        elif name not in ("self", "cls") and (doc.docment or known):
            lines.append(f":param {name}: {prose(' '.join((doc.docment or help).split()))}")
            if known: lines.append(f":type {name}: {type_text(doc.anno)}")
    return lines

def describe(entry:Entry, prose:Callable[[str], str])->str:
    "`entry` as a MyST directive; `prose` turns our markdown into MyST."
    value,kind = entry.value,entry.kind
    doc = inspect.getdoc(_function(value)) if kind != "data" else None
    if isinstance(value, type) and dataclasses.is_dataclass(value) and (doc or "").startswith(f"{value.__name__}("): doc = None # the one that Python makes up
    options = [f":{kind}:"] if kind in ("staticmethod", "classmethod") else []
    directive = "method" if options else kind
    if kind == "data" and len(repr(value)) < 80 and " at 0x" not in repr(value): options.append(f":value: {value!r}")
    return "\n".join([f"````{{py:{directive}}} {entry.name}{signature(entry)}", *options, "", prose(doc or ""), "", *fields(entry, prose), "````"])
