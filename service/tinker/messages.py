"""The protobuf messages of the Tinker wire, declared here: package tinker_public, proto3.

A field is `number name type`; before the type `*` means repeated and `?` optional; `name|` before it puts it into the oneof
of that name. Enums are declared as int32, which has the same bytes.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto
from google.protobuf.message import DecodeError, Message

from service.errors import Malformed

FLOAT32, INT64, INT32, BFLOAT16 = 1, 2, 3, 4  # DType
STOP, LENGTH = 0, 1  # StopReason

PACKAGE = "tinker_public"
SCHEMA = {
    "ForwardBackwardRequest": """
        1 model_id string; 2 seq_id int32; 3 data *Datum; 4 loss_fn string; 5 loss_fn_config map:double; 6 forward_only bool;
        7 loss_fn_config_v2 map:LossConfigValue""",
    "LossConfigValue": "1 number value|double; 2 text value|string",
    "Datum": """
        1 model_input *Chunk; 2 loss_fn_inputs map:Tensor; 3 model_input_spans *ProvenanceSpan;
        4 loss_fn_input_spans *ProvenanceSpan""",
    "ProvenanceSpan": "1 prompt_tokens span|Span; 2 sampled_tokens span|Span",
    "Span": "1 sequence_id string; 2 offset int64; 3 length int64",
    "Chunk": "1 encoded_text chunk|EncodedTextChunk; 2 image chunk|Opaque; 3 dmel chunk|Opaque",
    "EncodedTextChunk": "1 tokens bytes",
    "Opaque": "",
    "Tensor": "1 dense encoding|bytes; 2 sparse_csr encoding|SparseCsr; 3 dtype int32; 4 shape *int64",
    "SparseCsr": "1 values bytes; 2 crow_indices bytes; 3 col_indices bytes",
    "ForwardBackwardOutput": "1 loss_fn_output_type string; 2 loss_fn_outputs *ArrayRecord; 3 metrics map:double",
    "ArrayRecord": "1 type_tag string; 2 fields map:BatchedTensor; 3 num_datums int64",
    "BatchedTensor": "1 data bytes; 2 offsets bytes; 3 dtype int32; 4 trailing_shape *int64",
    "SampleResponse": """
        1 sequences *SampledSequence; 2 prompt_logprobs ?bytes; 3 topk_prompt_logprobs ?TopkLogprobs;
        4 prompt_cache_hit_tokens int32; 5 target_prompt_logprobs ?Tensor""",
    "SampledSequence": "1 stop_reason int32; 2 tokens bytes; 3 logprobs ?bytes; 4 topk_sampled_logprobs ?TopkLogprobs",
    "TopkLogprobs": "1 token_ids bytes; 2 logprobs bytes; 3 k uint32; 4 length uint32",
}
SCALARS = {
    "double": FieldDescriptorProto.TYPE_DOUBLE,
    "int64": FieldDescriptorProto.TYPE_INT64,
    "int32": FieldDescriptorProto.TYPE_INT32,
    "uint32": FieldDescriptorProto.TYPE_UINT32,
    "bool": FieldDescriptorProto.TYPE_BOOL,
    "string": FieldDescriptorProto.TYPE_STRING,
    "bytes": FieldDescriptorProto.TYPE_BYTES,
}


def _classes() -> dict[str, type[Any]]:
    """The classes, in a pool of their own: the client's package may be loaded in the same process."""
    file = descriptor_pb2.FileDescriptorProto(name="tinker_public.proto", package=PACKAGE, syntax="proto3")
    for name, fields in SCHEMA.items():
        _declare(file.message_type.add(name=name), fields)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in SCHEMA}


def _declare(message: DescriptorProto, fields: str) -> None:
    optional: list[FieldDescriptorProto] = []
    for text in filter(None, map(str.strip, fields.split(";"))):
        number, name, kind = text.split()
        field = message.field.add(name=name, number=int(number), label=FieldDescriptorProto.LABEL_OPTIONAL)
        if kind.startswith("map:"):
            field.label = FieldDescriptorProto.LABEL_REPEATED
            _type(field, _entry(message, name, kind.removeprefix("map:")))
            continue
        group, _, kind = kind.rpartition("|")
        if group:
            if group not in [oneof.name for oneof in message.oneof_decl]:
                message.oneof_decl.add(name=group)
            field.oneof_index = [oneof.name for oneof in message.oneof_decl].index(group)
        if kind.startswith("*"):
            field.label = FieldDescriptorProto.LABEL_REPEATED
        if kind.startswith("?"):
            field.proto3_optional = True
            optional.append(field)
        _type(field, kind.lstrip("*?"))
    for field in optional:  # proto3 has a oneof of its own for each, behind the others
        field.oneof_index = len(message.oneof_decl)
        message.oneof_decl.add(name=f"_{field.name}")


def _entry(message: DescriptorProto, name: str, kind: str) -> str:
    """Declare the message of a map's entries; its keys are strings."""
    entry = message.nested_type.add(name="".join(part.capitalize() for part in name.split("_")) + "Entry")
    entry.options.map_entry = True
    for number, part, part_kind in ((1, "key", "string"), (2, "value", kind)):
        _type(entry.field.add(name=part, number=number, label=FieldDescriptorProto.LABEL_OPTIONAL), part_kind)
    return f"{message.name}.{entry.name}"


def _type(field: FieldDescriptorProto, kind: str) -> None:
    if kind in SCALARS:
        field.type = SCALARS[kind]
    else:
        field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{PACKAGE}.{kind}"


CLASSES = _classes()
ForwardBackwardRequest = CLASSES["ForwardBackwardRequest"]
ForwardBackwardOutput = CLASSES["ForwardBackwardOutput"]
SampleResponse = CLASSES["SampleResponse"]


def read(kind: type[Any], raw: bytes) -> Any:
    """Parse a message. Raises Malformed."""
    message: Message = kind()
    try:
        message.ParseFromString(raw)
    except DecodeError:
        name = message.DESCRIPTOR.name
        raise Malformed(
            f"the body is no whole protobuf message {PACKAGE}.{name}: it was cut off, or is something else ({len(raw)} bytes)",
            code="malformed_protobuf",
        ) from None
    return message
