"""Checking of the code in TorchScript archives against an allow list.

TorchScript is close to Python. Python's own parser reads it (nothing is compiled or run), every construct
and every called function must be on a list, and PyTorch gets the text that is unparsed from the checked
tree: so no text can mean one thing to this parser and another to PyTorch's.
"""

from __future__ import annotations

import ast
import re
import warnings

from models.inert import RefusedError, shown

MAX_DEPTH = 150  # of the tree: PyTorch's parser recurses without a limit
_TEXT = re.compile(r"[\n\x20-\x5b\x5d-\x7e]*")  # printable ASCII without the backslash
_ROW = re.compile(r"(?:[-+~*] *|\bnot +){40}")  # Python's parser recurses at each of these operators

# Functions of torch that only compute with the given tensors and numbers: no file access, no other device,
# no code execution.
_MATHS = """
abs adaptive_avg_pool2d add addcdiv addcmul addmm alias all amax amin any append arange argmax argmin
argsort atleast_1d avg_pool1d avg_pool2d baddbmm batch_norm bitwise_and bitwise_not bitwise_or bmm Bool
broadcast_tensors broadcast_to cat ceil celu channel_shuffle chunk clamp clamp_max clamp_min clone
column_stack constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose2d copy cos count_nonzero
cumprod cumsum detach device diff dim div dropout einsum elu empty empty_like eq erf exp exp2 expand
expand_as eye feature_dropout fill flatten flip Float FloatImplicit floor floor_divide floordiv fmod
format frac full full_like gather ge gelu glu group_norm gt hardshrink hardsigmoid hardswish hardtanh
hstack index index_add index_fill index_put index_select instance_norm Int IntImplicit is_floating_point
isfinite isinf isnan item layer_norm le leaky_relu len lift lift_fresh linalg_norm linear linspace log
log10 log1p log2 logical_and logical_not logical_or logsigmoid logsumexp lt masked_fill masked_select
matmul max max_pool1d max_pool2d maximum mean meshgrid min minimum mish movedim mul nan_to_num narrow ne
neg new_empty new_full new_ones new_zeros nonzero norm numel ones ones_like pad permute pixel_shuffle
pixel_unshuffle pow prelu prod reciprocal reflection_pad2d relu relu6 remainder repeat repeat_interleave
replication_pad2d reshape roll round rsqrt rsub ScalarImplicit scaled_dot_product_attention scatter
scatter_add select selu sigmoid sign silu sin size slice softmax softplus softsign sort split
split_with_sizes sqrt square squeeze stack std sub sum swapaxes tanh tensor threshold tile to topk
transpose tril triu trunc type_as unbind unflatten unsafe_chunk unsafe_split unsqueeze
upsample_bicubic2d upsample_bilinear2d upsample_nearest2d var view view_as vstack where zero zeros
zeros_like zip __and__ __contains__ __derive_index __getitem__ __is__ __isnot__ __not__ __or__
__range_length _convolution _set_item _shape_as_tensor _softmax
"""
FUNCTIONS = frozenset(f"torch.{name}" for name in _MATHS.split()) | {
    *("ops.torchvision.nms", "ops.prim.NumToTensor", "ops.prim.RaiseException", "ops.prim.device"),
    *("ops.prim.dtype", "ops.prim.min", "ops.prim.max", "ops.prim.unchecked_unwrap_optional"),
    *("ops.prim.type", "ops.prim.is_cuda", "ops.prim.layout"),
}
_WORDS = frozenset("annotate bool float getattr int range unchecked_cast uninitialized".split())
_METHOD = re.compile(r"forward\d*|__forward")
_BASES = frozenset(("Module", "NamedTuple"))
_NODES = (
    *(
        ast.Module,
        ast.ClassDef,
        ast.FunctionDef,
        ast.arguments,
        ast.arg,
        ast.AnnAssign,
        ast.Assign,
        ast.Return,
    ),
    *(
        ast.If,
        ast.For,
        ast.While,
        ast.Expr,
        ast.Pass,
        ast.Raise,
        ast.Name,
        ast.Attribute,
        ast.Constant,
        ast.Call,
    ),
    *(
        ast.keyword,
        ast.Tuple,
        ast.List,
        ast.Dict,
        ast.Subscript,
        ast.Slice,
        ast.UnaryOp,
        ast.BinOp,
        ast.BoolOp,
    ),
    *(ast.Compare, ast.IfExp, ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)


def checked_code(text: str, where: str) -> str:
    """Check the code of one file of an archive and return it unparsed. Raises RefusedError if not allowed."""
    if not _TEXT.fullmatch(text) or _ROW.search(text):
        raise RefusedError(f"its code {shown(where)} has characters that networks do not need")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
        _check(tree)
        return ast.unparse(tree) + "\n"
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RefusedError(f"its code {shown(where)} cannot be read ({type(error).__name__})") from error


def _check(tree: ast.Module) -> None:
    """Walk the tree iteratively, since a file may nest to any depth. Raises RefusedError."""
    called: set[int] = set()  # ids of the names that are part of an allowed call
    waiting: list[tuple[ast.AST, int]] = [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise RefusedError("its code is nested too deep")
        if not isinstance(node, _NODES):
            raise RefusedError(f"its code has a {type(node).__name__}")
        if isinstance(node, ast.Call):
            _check_call(node, called)
        elif isinstance(node, ast.Name) and node.id in ("torch", "ops") and id(node) not in called:
            raise RefusedError(f"its code takes {node.id} for a value")
        elif isinstance(node, ast.Attribute) and _dotted(node).startswith("__torch__.torch.classes"):
            raise RefusedError(f"its code names the class {shown(_dotted(node))}")
        elif isinstance(node, ast.ClassDef):
            _check_class(node)
        elif isinstance(node, ast.FunctionDef):
            _check_function(node, called)
        waiting.extend((child, depth + 1) for child in ast.iter_child_nodes(node))


def _check_class(node: ast.ClassDef) -> None:
    bases = [base.id if isinstance(base, ast.Name) else "" for base in node.bases]
    if node.decorator_list or node.keywords or not set(bases) <= _BASES:
        raise RefusedError(f"its code has a class of an unknown kind ({shown(node.name)})")


def _check_function(node: ast.FunctionDef, called: set[int]) -> None:
    """Refuse decorators; allow calls of local names that only ever refer to a function of the archive."""
    if node.decorator_list:
        raise RefusedError("its code has a decorator")
    own, other = set(), {argument.arg for argument in node.args.args}
    for part in ast.walk(node):
        if isinstance(part, ast.Assign) and _dotted(part.value).startswith("__torch__."):
            own |= {target.id for target in part.targets if isinstance(target, ast.Name)}
        elif isinstance(part, ast.Assign | ast.AnnAssign | ast.For):
            targets = part.targets if isinstance(part, ast.Assign) else [part.target]
            other |= {
                name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
            }
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id in own - other:
            called.add(id(part.func))


def _check_call(node: ast.Call, called: set[int]) -> None:
    """Allow only calls of listed functions, and of functions and modules of the archive itself."""
    function = node.func
    name = _dotted(function)
    if name.startswith(("torch.", "ops.")):
        if name not in FUNCTIONS and name.removesuffix("_") not in FUNCTIONS:
            raise RefusedError(f"its code calls {shown(name)}")
        root: ast.AST = function
        while isinstance(root, ast.Attribute):
            root = root.value
        called.add(id(root))
    elif isinstance(function, ast.Name):
        if function.id not in _WORDS and id(function) not in called:
            raise RefusedError(f"its code calls {shown(function.id)}")
    elif not (
        name.startswith("__torch__.")
        or (isinstance(function, ast.Attribute) and _METHOD.fullmatch(function.attr))
    ):
        raise RefusedError(f"its code calls {shown(getattr(function, 'attr', type(function).__name__))}")


def _dotted(node: ast.AST) -> str:
    """Return `a.b.c` for a chain of names; an empty string for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([node.id, *reversed(parts)])
