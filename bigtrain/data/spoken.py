"""A line of Python in words: `count += 1` -> `add 1 to count`. Rules of our own over the syntax tree.

The words follow the line's meaning, not its order (`a.b` is "b of a", `x -= y` "subtract y from x"), so that saying a
line takes its parse, as a translation does, while names have to be carried over as they are.
"""

from __future__ import annotations

import ast

LONGEST = 25  # words: what is longer nobody would say


class Unspoken(Exception):
    """A construct that has no words here."""


def spoken(line: str) -> str | None:
    """A stripped logical line in words; None for one that is not whole by itself, or has no words here.

    A compound statement's first line (`if x:`) is said without what it governs.
    """
    if line.startswith("#") or "\\" in line:  # the parser warns of escapes that a later Python will refuse
        return None
    kind = "while True:\n " if line.startswith(("break", "continue")) else ""
    kind = kind or ("def f():\n " if line.startswith("return") else "")
    before = "if True:\n pass\n" if line.startswith("elif ") else ""
    line = line.removeprefix("el") if before else line
    try:
        parsed = ast.parse(kind + line + (" pass" if line.endswith(":") else "")).body[0]
        statement = parsed.body[0] if kind and isinstance(parsed, (ast.While, ast.FunctionDef)) else parsed
        words = ("otherwise " if before else "") + _statement(statement)
    except (SyntaxError, ValueError, IndexError, Unspoken):
        return None
    return words if len(words.split()) <= LONGEST else None


def _statement(node: ast.stmt) -> str:
    match node:
        case ast.Assign(targets=[target], value=value):
            return f"set {_expression(target)} to {_expression(value)}"
        case ast.AugAssign(target=target, op=op, value=value):
            return _AUGMENTED[_known(_AUGMENTED, op)].format(_expression(target), _expression(value))
        case ast.Return(value=None):
            return "return"
        case ast.Return(value=value) if value is not None:
            return f"return {_expression(value)}"
        case ast.If(test=test):
            return f"if {_expression(test)}"
        case ast.While(test=test):
            return f"as long as {_expression(test)}"
        case ast.For(target=target, iter=iterable):
            return f"for each {_expression(target)} in {_expression(iterable)}"
        case ast.Expr(value=ast.Call() as call):
            return f"call {_call(call)}"
        case ast.Raise(exc=ast.Call(func=function, args=[message], keywords=[])):
            return f"raise {_expression(function)} with {_expression(message)}"
        case ast.Raise(exc=error) if error is not None:
            return f"raise {_expression(error)}"
        case ast.Raise():
            return "raise the error again"
        case ast.Assert(test=test, msg=None):
            return f"make sure that {_expression(test)}"
        case ast.Delete(targets=[target]):
            return f"delete {_expression(target)}"
        case ast.Import(names=[ast.alias(name=name, asname=other)]):
            return f"import {name}" + (f" under the name {other}" if other else "")
        case ast.ImportFrom(module=module, names=names, level=0) if all(alias.asname is None for alias in names):
            return f"take {_listed([alias.name for alias in names])} from {module}"
        case ast.Global(names=names):
            return f"let {_listed(names)} be global"
    raise Unspoken


def _expression(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Constant(value=None):
            return "nothing"
        case ast.Constant(value=bool(value)):
            return "true" if value else "false"
        case ast.Constant(value=int(value)):
            return str(value)
        case ast.Constant(value=str(value)) if value == value.strip() and value.isprintable() and value:
            return f"the text {value}"
        case ast.Constant(value="") | ast.List(elts=[]) | ast.Dict(keys=[]) | ast.Tuple(elts=[]):
            return f"an empty {_EMPTY[type(node)]}"
        case ast.Attribute(value=value, attr=name):
            return f"{name} of {_expression(value)}"
        case ast.Subscript(value=value, slice=ast.Slice(lower=lower, upper=upper, step=None)):
            first = f" from {_expression(lower)}" if lower is not None else ""
            last = f" up to {_expression(upper)}" if upper is not None else ""
            return f"the part{first}{last} of {_expression(value)}" if first or last else f"all of {_expression(value)}"
        case ast.Subscript(value=value, slice=index) if not isinstance(index, ast.Slice):
            return f"item {_expression(index)} of {_expression(value)}"
        case ast.Call():
            return f"the result of {_call(node)}"
        case ast.BinOp(left=left, op=op, right=right):
            return f"{_expression(left)} {_BINARY[_known(_BINARY, op)]} {_expression(right)}"
        case ast.BoolOp(op=op, values=values):
            return (" and " if isinstance(op, ast.And) else " or ").join(map(_expression, values))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return f"not {_expression(operand)}"
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return f"minus {_expression(operand)}"
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return f"{_expression(left)} {_COMPARED[_known(_COMPARED, op)]} {_expression(right)}"
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return _listed([_expression(item) for item in items])
        case ast.IfExp(test=test, body=body, orelse=other):
            return f"{_expression(body)} if {_expression(test)} or else {_expression(other)}"
    raise Unspoken


def _call(node: ast.Call) -> str:
    """The function before what it is given; a method's object comes after it, as "of" says."""
    given = [_expression(argument) for argument in node.args]
    given += [f"{keyword.arg} being {_expression(keyword.value)}" for keyword in node.keywords if keyword.arg]
    if len(given) != len(node.args) + len(node.keywords):
        raise Unspoken  # **options
    return _expression(node.func) + (f" with {_listed(given)}" if given else "")


def _listed(items: list[str]) -> str:
    return " and ".join(part for part in (", ".join(items[:-1]), items[-1]) if part)


def _known(words: dict[type, str], node: ast.AST) -> type:
    if type(node) not in words:
        raise Unspoken
    return type(node)


_EMPTY: dict[type, str] = {ast.Constant: "text", ast.List: "list", ast.Dict: "mapping", ast.Tuple: "tuple"}
_AUGMENTED: dict[type, str] = {
    ast.Add: "add {1} to {0}", ast.Sub: "subtract {1} from {0}", ast.Mult: "multiply {0} by {1}",
    ast.Div: "divide {0} by {1}", ast.FloorDiv: "divide {0} by {1} and round down",
}  # fmt: skip
_BINARY: dict[type, str] = {
    ast.Add: "plus", ast.Sub: "minus", ast.Mult: "times", ast.Div: "divided by", ast.Mod: "modulo",
    ast.Pow: "to the power of", ast.FloorDiv: "divided and rounded down by",
}  # fmt: skip
_COMPARED: dict[type, str] = {
    ast.Eq: "equals", ast.NotEq: "differs from", ast.Lt: "is less than", ast.LtE: "is at most",
    ast.Gt: "is greater than", ast.GtE: "is at least", ast.Is: "is", ast.IsNot: "is not", ast.In: "is in",
    ast.NotIn: "is not in",
}  # fmt: skip
