"""Requests that are nearly right: one or two changes to a body that would be taken. They get further than noise does."""

import copy
import json
import math
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from service.relay.tensors import ITEM_BYTES, LENGTH_BYTES, METADATA, Tensor, Tensors, encode
from service.sessions.codec import HEAD

WHOLE = (0, 1, -1, 2, 3, 64, 65, 127, 128, 255, 1024, 1025, 4096, 4097, 65_536, 65_537, 131_072, 2**31 - 1, 2**31, 2**32)
HUGE = (2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 10**30, 10**400)
REAL = (
    0.0,
    -0.0,
    0.5,
    1.0,
    1.5,
    -1.5,
    1e-300,
    5e-324,
    1e38,
    3.5e38,
    1e300,
    1.7976931348623157e308,
    math.nan,
    math.inf,
    -math.inf,
)
TEXTS = (
    "",
    " ",
    "x",
    "0",
    "-1",
    "1e3",
    "null",
    "true",
    "x" * 65,
    "x" * 129,
    "x" * 5000,
    "\x00",
    "a\x00b",
    "\ud800",
    "\U0001f600",
    "é",
    "e\u0301",
    "\u202e",
    "\ufeff",
    "\x7f\x1b[0m",
    "../../etc/passwd",
    "/etc/passwd",
    "%s%n{0}{x}",
    "{prompt}",
    "{{item.answer}}",
    "' OR 1=1 --",
    "*",
    "a/b",
    "tiny",
    "cross_entropy",
    "ppo",
    "optim_step",
    "job_01k0000000000000000000000",
    "ckpt_01k0000000000000000000000",
    "tinker://x/weights/y",
)
Json = Any


class Mutator:
    """Changes what it is given at places and in ways that `draw` chooses. `others`: values that are right elsewhere, such as
    the ids of objects that there are."""

    def __init__(self, draw: random.Random, others: Sequence[Any] = ()) -> None:
        self.draw, self.others = draw, list(others)

    def count(self) -> int:
        """How many changes: mostly one or two."""
        return self.draw.choices((0, 1, 2, 3, 6), (8, 50, 28, 10, 4))[0]

    def value(self) -> Json:
        draw = self.draw
        kinds: list[Callable[[], Json]] = [
            lambda: draw.choice(WHOLE),
            lambda: draw.choice(HUGE),
            lambda: draw.choice(REAL),
            lambda: draw.choice(TEXTS),
            lambda: draw.choice(self.others) if self.others else "x",
            lambda: draw.choice((None, True, False)),
            lambda: draw.choice(([], {}, [[]], [None], {"": None}, [0] * 100, {"type": "x"}, [{}], ["a", 1])),
            lambda: self.deep(draw.choice((5, 40, 200))),
        ]
        return draw.choices([kind() for kind in kinds], (5, 3, 4, 5, 4, 3, 3, 0.3))[0]

    def deep(self, levels: int) -> Json:
        value: Json = 1
        for _ in range(levels):
            value = [value] if self.draw.random() < 0.5 else {"a": value}
        return value

    # ---------------------------------------------------------------- JSON

    def tree(self, value: Json, spare: Sequence[Json] = (), count: int | None = None) -> Json:
        """`spare`: other right bodies, whose parts may take the place of parts of this one."""
        value = copy.deepcopy(value)
        for _ in range(self.count() if count is None else count):
            value = self._changed(value, spare)
        return value

    def _changed(self, whole: Json, spare: Sequence[Json]) -> Json:
        places = list(_places(whole))
        if not places or self.draw.random() < 0.01:
            return self.value()
        holder, key = self.draw.choice(places)
        old = holder[key]
        match self.draw.randrange(12):
            case 0 | 1 | 2:
                holder[key] = self.value()
            case 3:
                del holder[key]
            case 4 if isinstance(holder, dict):
                holder[self.draw.choice(("x", "", "_", str(key).upper(), f"{key}s", f"{key}\u0000"))] = holder.pop(key)
            case 4 | 5 if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(old))
            case 6 if isinstance(old, list) and old:
                holder[key] = old * self.draw.choice((2, 3, 70))
            case 7 if isinstance(old, int | float) and not isinstance(old, bool):
                holder[key] = self.draw.choice(
                    (
                        old + 1,
                        old - 1,
                        -old,
                        f"{old:.6}" if isinstance(old, float) else old * 1.0 if abs(old) < 2**60 else 0.5,
                        str(old),
                        [old],
                        old * 1000,
                    )
                )
            case 7 if isinstance(old, str):
                holder[key] = self.draw.choice(
                    (old + "x", old[:-1], old.upper(), [old], old * 50, old[::-1], f" {old}", old + "\u0000")
                )
            case 8:
                holder[key] = self.draw.choice(([old], {"x": old}, json.dumps(old)[:2000], str(old)[:2000]))
            case 9:
                other, name = self.draw.choice(places)
                holder[key] = copy.deepcopy(other[name]) if other is not holder or name != key else None
            case 10 if spare:
                found = [h[k] for one in spare for h, k in _places(one) if k == key or isinstance(key, int)]
                holder[key] = copy.deepcopy(self.draw.choice(found)) if found else None
            case 11 if isinstance(holder, dict) and spare:
                name, given = self.draw.choice(
                    [item for one in spare if isinstance(one, dict) for item in one.items()] or [("x", 1)]
                )
                holder[name] = copy.deepcopy(given)
            case _:
                holder[key] = self.value()
        return whole

    def text(self, value: Json) -> bytes:
        """The value's text; now and then one that no library writes."""
        text = json.dumps(value, ensure_ascii=self.draw.random() < 0.5).encode("utf-8", "surrogatepass")
        return self.damaged(text, self.draw.choice((1, 2))) if self.draw.random() < 0.06 else text

    # ---------------------------------------------------------------- bytes

    def damaged(self, raw: bytes, count: int = 1) -> bytes:
        for _ in range(count):
            at = self.draw.randrange(len(raw) + 1)
            match self.draw.randrange(8):
                case 0:
                    raw = raw[:at]
                case 1:
                    raw = raw[at:]
                case 2 if raw:
                    at = min(at, len(raw) - 1)
                    raw = raw[:at] + bytes([raw[at] ^ (1 << self.draw.randrange(8))]) + raw[at + 1 :]
                case 3:
                    raw = (
                        raw[:at]
                        + self.draw.choice((b"\x00", b"\xff", b"\xc3", b'"', b"{", b"]", b",", b"\r\n", b"\xef\xbb\xbf"))
                        + raw[at:]
                    )
                case 4:
                    raw = raw + raw[: self.draw.choice((1, 8, len(raw)))]
                case 5:
                    raw = raw[:at] + self.draw.randbytes(self.draw.choice((1, 4, 8))) + raw[at + 8 :]
                case 6:
                    raw = self.draw.choice((b"", b"null", b"[]", b"{}", b"0", b'"x"', b" " * 50, raw * 2))
                case _:
                    end = self.draw.randrange(at, len(raw) + 1)
                    raw = raw[:at] + raw[end:]
        return raw

    # ---------------------------------------------------------------- tensors

    def tensors(self, head: Json, tensors: Tensors, spare: Sequence[Json] = ()) -> bytes:
        """A safetensors body: the head or some tensor is changed, or the file itself."""
        tensors = dict(tensors)
        for _ in range(self.count()):
            if self.draw.random() < 0.45 or not tensors:
                head = self.tree(head, spare, 1)
            else:
                self._tensor(tensors)
        text = json.dumps(head)
        raw = encode(tensors, {HEAD: text} if self.draw.random() < 0.98 else {"x": text})
        if self.draw.random() < 0.1:
            length = int.from_bytes(raw[:LENGTH_BYTES], "little")
            header = self.tree(json.loads(raw[LENGTH_BYTES : LENGTH_BYTES + length]), count=1)
            head_bytes = json.dumps(header).encode()
            raw = len(head_bytes).to_bytes(LENGTH_BYTES, "little") + head_bytes + raw[LENGTH_BYTES + length :]
        return self.damaged(raw) if self.draw.random() < 0.05 else raw

    def _tensor(self, tensors: Tensors) -> None:
        name = self.draw.choice(sorted(tensors))
        old = tensors[name]
        item = ITEM_BYTES[old.dtype]
        match self.draw.randrange(7):
            case 0:
                del tensors[name]
            case 1:
                tensors[self.draw.choice(("x", "weights", "mask", "advantages", "log_probs", "rewards", METADATA + "x"))] = old
            case 2:
                dtype = self.draw.choice(sorted(ITEM_BYTES))
                tensors[name] = Tensor(dtype, old.shape, memoryview(bytes(len(old) * ITEM_BYTES[dtype])))
            case 3:
                shape = self.draw.choice(
                    ((), (0,), (*old.shape, 1), (1, *old.shape), (len(old) + 1,), (len(old), 0), (len(old), 1025))
                )
                tensors[name] = Tensor(old.dtype, shape, memoryview(bytes(math.prod(shape) * item)))
            case 4:
                other = tensors[self.draw.choice(sorted(tensors))]
                tensors[name] = other
            case _:
                tensors[name] = Tensor(old.dtype, old.shape, memoryview(self.numbers(bytes(old.data), item)))

    def numbers(self, raw: bytes, item: int) -> bytes:
        """One of the numbers is another one: an edge of whole or of real numbers of this size."""
        if len(raw) < item:
            return raw
        forms = {8: ("<q", "<d"), 4: ("<i", "<f")}.get(item, ("<b", "<b"))
        if self.draw.random() < 0.6:
            most = 2 ** (8 * item - 1)
            whole = self.draw.choice([n for n in (*WHOLE, most - 1, -most, 10, 100, 95, 96, 97) if -most <= n < most])
            new = struct.pack(forms[0], whole) if item > 2 else struct.pack("<b", max(-128, min(127, whole))) * item
        elif item > 2:
            real = self.draw.choice([n for n in REAL if item == 8 or not math.isfinite(n) or abs(n) < 3.4e38])
            new = struct.pack(forms[1], real)
        else:
            new = self.draw.randbytes(item)
        at = self.draw.randrange(len(raw) // item) * item
        return raw[:at] + new + raw[at + item :]

    # ---------------------------------------------------------------- protobuf

    def message(self, message: Message, names: Sequence[str] = ()) -> bytes:
        """`names`: of things that maps are keyed by."""
        changed = type(message)()
        changed.CopyFrom(message)
        for _ in range(self.count()):
            self._field(self.draw.choice(list(_messages(changed))), names)
        raw = changed.SerializeToString()
        return self.damaged(raw, self.draw.choice((1, 2))) if self.draw.random() < 0.08 else raw

    def _field(self, message: Any, names: Sequence[str]) -> None:
        fields = list(message.DESCRIPTOR.fields)
        set_ = [field for field, _ in message.ListFields()]
        if not fields:
            return
        field: Any = self.draw.choice(set_ if set_ and self.draw.random() < 0.75 else fields)
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            keys = sorted(value)
            inner = field.message_type.fields_by_name["value"]
            if keys and self.draw.random() < 0.4:
                del value[self.draw.choice(keys)]
            elif inner.message_type is None:
                value[self.draw.choice([*names, "x", ""])] = self._scalar(inner, 0)
            else:
                new = self.draw.choice([*names, "x"])
                if keys:
                    value[new].CopyFrom(value[self.draw.choice(keys)])
                else:
                    value[new].SetInParent()
        elif field.is_repeated:
            if value and self.draw.random() < 0.4:
                del value[self.draw.randrange(len(value))]
            elif field.message_type is None:
                value.append(self._scalar(field, 0))
            elif value and self.draw.random() < 0.9:
                for _ in range(self.draw.choice((1, 1, 2, 30))):
                    value.add().CopyFrom(value[self.draw.randrange(len(value))])
            else:
                value.add()
        elif field.message_type is not None:
            message.ClearField(field.name) if message.HasField(field.name) else value.SetInParent()
        elif self.draw.random() < 0.15:
            message.ClearField(field.name)
        else:
            setattr(message, field.name, self._scalar(field, value))

    def _scalar(self, field: FieldDescriptor, old: Any) -> Any:
        draw = self.draw
        match field.type:
            case FieldDescriptor.TYPE_BYTES:
                raw = old or b"\x05\x00\x00\x00"
                if draw.random() < 0.5:
                    return self.numbers(raw, draw.choice((4, 4, 8)))
                return draw.choice((raw + raw, raw[:-1], raw[:-4], raw + bytes(4), b"", raw[4:], bytes(len(raw)), raw * 40))
            case FieldDescriptor.TYPE_STRING:
                texts = [text for text in TEXTS if "\ud800" not in text]
                return str(draw.choice([*texts, *(one for one in self.others if isinstance(one, str)), f"{old}x"]))
            case FieldDescriptor.TYPE_BOOL:
                return not old
            case FieldDescriptor.TYPE_DOUBLE:
                return draw.choice(REAL)
            case FieldDescriptor.TYPE_UINT32:
                return draw.choice([n for n in WHOLE if 0 <= n < 2**32])
            case FieldDescriptor.TYPE_INT32:
                return draw.choice([n for n in (*WHOLE, old + 1, -(2**31)) if -(2**31) <= n < 2**31])
            case _:
                return draw.choice([n for n in (*WHOLE, *HUGE, old + 1) if -(2**63) <= n < 2**63])


def _places(value: Json) -> Iterator[tuple[Any, Any]]:
    """Every holder and key below; of long lists of numbers only a few."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
        if len(items) > 6 and not isinstance(value[0], dict | list):
            items = [*items[:3], *items[-2:]]
    for key, below in items:
        yield value, key
        yield from _places(below)


def _messages(message: Any) -> Iterator[Any]:
    """The message and those below it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].message_type is not None:
                for key in sorted(value):
                    yield from _messages(value[key])
        elif field.is_repeated:
            for one in value:
                yield from _messages(one)
        else:
            yield from _messages(value)
