"""The messages of the Tinker wire, against the client's own code: what it sends is read, and what we send it reads."""

from array import array
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from tinker import types
from tinker.lib.chunked_fwdbwd_helpers import combine_fwd_bwd_output_results
from tinker.proto import tinker_public_pb2 as theirs
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from service.errors import BodyTooLarge, InvalidRequest, Malformed, NotFound
from service.losses.numbers import tensor
from service.sessions.codec import unpack
from service.sessions.tensors import ROWS, check
from service.tinker import answers, datums, messages
from service.tinker.compression import expanded
from service.tinker.tickets import Ticket

LIMIT = 2**20


def datum(tokens, **inputs):
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


def sent(*data: types.Datum, loss: Any = "cross_entropy", config: Any = None, forward_only: bool = False) -> Any:
    """The message as the client makes it."""
    request = ForwardBackwardRequest(
        model_id="s:train:0",
        seq_id=7,
        forward_backward_input=ForwardBackwardInput(data=list(data), loss_fn=loss, loss_fn_config=config),
    )
    message = forward_backward_request_to_proto(request)
    message.forward_only = forward_only
    return message


def asked(message):
    """(head, tensors, Asked) of a message of theirs, read from its bytes."""
    operation = datums.asked(messages.read(messages.ForwardBackwardRequest, message.SerializeToString()))
    head, tensors = unpack(operation.request)
    return head, tensors, operation


def values(value):
    return array({"F32": "f", "I64": "q", "I32": "i"}[value.dtype], value.data.tobytes()).tolist()


def refused(message):
    with pytest.raises(InvalidRequest) as caught:
        asked(message)
    return caught.value.errors[0]


# ---------------------------------------------------------------- requests


def test_datums_become_the_flat_tensors_of_a_session():
    head, tensors, operation = asked(
        sent(
            datum([5, 6, 7], target_tokens=[6, 7, 8], weights=[0.0, 0.5, -0.1]),
            datum([9], target_tokens=[2**31 + 5], weights=[1.0]),
        )
    )
    assert head == {"kind": "forward_backward", "loss": "cross_entropy", "config": {}}
    assert (operation.kind, operation.seq, operation.cost) == ("forward_backward", 7, 4)
    assert values(tensors["tokens"]) == [5, 6, 7, 9]
    assert values(tensors["cu_seqlens"]) == [0, 3, 4]
    assert values(tensors["target_tokens"]) == [6, 7, 8, 2**31 + 5]  # the worker looks at the vocabulary
    assert values(tensors["weights"]) == pytest.approx([0.0, 0.5, -0.1, 1.0])
    assert check(tensors, ROWS) == {"B": 2, "N": 4}  # what a native client may send


def test_names_of_inputs_and_the_config_are_translated():
    inputs = {"target_tokens": [1, 2], "logprobs": [-0.5, -0.25], "advantages": [0.0, 2.0]}
    clips = {"clip_low_threshold": [0.5, 0.75], "clip_high_threshold": [1.5, 2.0]}
    head, tensors, _ = asked(sent(datum([1, 2], **inputs, **clips), loss="ppo", config={"clip_low_threshold": 0.9}))
    assert (head["loss"], head["config"]) == ("ppo", {"clip_low_threshold": 0.9})
    assert values(tensors["log_probs"]) == [-0.5, -0.25] and values(tensors["advantages"]) == [0.0, 2.0]
    assert values(tensors["clip_low_threshold"]) == [0.5, 0.75]
    mask = types.TensorData(data=[0.0, 1.0], dtype="float32", shape=[2])
    _, tensors, _ = asked(sent(datum([1, 2], **inputs, sequence_ratio_mask=mask), loss="gspo", forward_only=True))
    assert values(tensors["mask"]) == [0.0, 1.0]


def test_forward_only_is_another_kind():
    assert asked(sent(datum([1], target_tokens=[2]), forward_only=True))[0]["kind"] == "forward"


def test_several_chunks_of_tokens_are_one_sequence():
    message = sent(datum([1, 2], target_tokens=[2, 3]))
    message.data[0].model_input[0].encoded_text.tokens = array("i", [1]).tobytes()
    message.data[0].model_input.add().encoded_text.tokens = array("i", [2]).tobytes()
    assert values(asked(message)[1]["tokens"]) == [1, 2]


def test_two_dimensional_targets_dense_and_sparse_are_the_same():
    targets = torch.tensor([[3, 0, 0, 0, 0, 0], [0, 0, 0, 4, 0, 0], [0, 0, 0, 0, 0, 0]])
    weights = torch.tensor([[0.5, 0, 0, 0, 0, 0], [0, 0, 0, 0.25, 0, 0], [0, 0, 0, 0, 0, 0.0]])
    sparse = sent(datum([1, 2, 3], target_tokens=targets, weights=weights))
    assert sparse.data[0].loss_fn_inputs["target_tokens"].WhichOneof("encoding") == "sparse_csr"
    dense = sent(
        datum(
            [1, 2, 3],
            target_tokens=types.TensorData.from_torch(targets),
            weights=types.TensorData.from_torch(weights),
        )
    )
    assert dense.data[0].loss_fn_inputs["target_tokens"].WhichOneof("encoding") == "dense"
    for message in (sparse, dense):
        head, tensors, _ = asked(message)
        assert tensors["target_tokens"].shape == tensors["weights"].shape == (3, 6)
        assert values(tensors["target_tokens"]) == targets.flatten().tolist()
        assert values(tensors["weights"]) == weights.flatten().tolist()
        assert "widths" not in head


@pytest.mark.parametrize("with_weights", [True, False])
def test_mixed_widths_are_filled_with_weight_zero_and_cut_back(with_weights):
    data = [
        datum([1, 2], target_tokens=np.array([[3, 4], [5, 6]]), weights=np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)),
        datum([1], target_tokens=np.array([7]), weights=np.array([5.0], np.float32)),
        datum([1], target_tokens=np.array([[8, 9, 10]]), weights=np.array([[6.0, 7.0, 8.0]], np.float32)),
    ]
    message = sent(*data)
    if not with_weights:
        for each in message.data:
            del each.loss_fn_inputs["weights"]
    head, tensors, _ = asked(message)
    assert values(tensors["target_tokens"]) == [3, 4, 0, 5, 6, 0, 7, 0, 0, 8, 9, 10]
    expected = [1, 2, 0, 3, 4, 0, 5, 0, 0, 6, 7, 8] if with_weights else [1, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1]
    assert values(tensors["weights"]) == expected
    assert head["widths"] == [[1, 2], [1, 0], [1, 3]]
    log_probs = tensor(array("f", [-t / 8 for t in values(tensors["target_tokens"])]), 4, 3)
    told = {"metrics": {"loss:sum": 1.5}, "widths": head["widths"]}
    raw = answers.forward_backward(told, {"log_probs": log_probs, "cu_seqlens": tensors["cu_seqlens"]})
    outputs = deserialize_forward_backward_output(raw).loss_fn_outputs
    assert [one["logprobs"].shape for one in outputs] == [[2, 2], [1], [1, 3]]
    flat = [one["logprobs"].to_numpy().flatten().tolist() for one in outputs]
    assert flat == [[-0.375, -0.5, -0.625, -0.75], [-0.875], [-1.0, -1.125, -1.25]]


def test_a_ticket_of_an_older_api_tells_the_widths_itself():
    old = f"op_{'1' * 26};runs=3x2,1x0"
    assert Ticket.parse(old).widths() == [[3, 2], [1, 0]] and str(Ticket.parse(old)) == f"op_{'1' * 26}"
    for wrong in (f"{old},", f"{old}x", f"{old};last=3"):
        with pytest.raises(NotFound):
            Ticket.parse(wrong)


def test_bfloat16_is_widened_and_narrow_integers_too():
    message = sent(datum([1, 2, 3], target_tokens=[1, 2, 3], weights=[1.0, 1.0, 1.0]))
    numbers = torch.tensor([0.5, -1.25, 3.140625], dtype=torch.bfloat16)
    message.data[0].loss_fn_inputs["weights"].dense = numbers.view(torch.int16).numpy().tobytes()
    message.data[0].loss_fn_inputs["weights"].dtype = theirs.DTYPE_BFLOAT16
    message.data[0].loss_fn_inputs["target_tokens"].dense = np.array([4, 5, 6], np.int32).tobytes()
    message.data[0].loss_fn_inputs["target_tokens"].dtype = theirs.DTYPE_INT32
    _, tensors, _ = asked(message)
    assert values(tensors["weights"]) == numbers.float().tolist()
    assert (tensors["target_tokens"].dtype, values(tensors["target_tokens"])) == ("I64", [4, 5, 6])


def test_stable_reinforce_names_an_alternative():
    error = refused(sent(datum([1], target_tokens=[1]), loss="stable_reinforce"))
    assert error.pointer == "/loss_fn" and "importance_sampling" in error.detail


def _with(change):
    message = sent(datum([1, 2, 3], target_tokens=[1, 2, 3], weights=[1.0, 1.0, 1.0]))
    change(message, message.data[0].loss_fn_inputs)
    return message


def _csr(value, *, crow=(0, 1, 1, 1), columns=(0,), width=4):
    value.sparse_csr.values = np.zeros(len(columns), np.float32).tobytes()
    value.sparse_csr.crow_indices = np.array(crow, np.int64).tobytes()
    value.sparse_csr.col_indices = np.array(columns, np.int64).tobytes()
    value.shape[:] = [3, width]


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        (lambda m, i: m.data.pop(), "/data"),
        (lambda m, i: m.data[0].model_input.pop(), "/data/0/model_input"),
        (lambda m, i: m.data[0].model_input.add().image.SetInParent(), "/data/0/model_input/1"),
        (lambda m, i: i.pop("target_tokens"), "/data/0/loss_fn_inputs"),
        (lambda m, i: i["wieghts"].CopyFrom(i["weights"]), "/data/0/loss_fn_inputs/wieghts"),
        (lambda m, i: i["weights"].shape.append(2), "/data/0/loss_fn_inputs/weights"),
        (lambda m, i: i["weights"].shape.__setitem__(0, 2), "/data/0/loss_fn_inputs/weights"),
        (lambda m, i: setattr(i["weights"], "dense", b"123"), "/data/0/loss_fn_inputs/weights"),
        (lambda m, i: setattr(i["weights"], "dense", bytes(16)), "/data/0/loss_fn_inputs/weights"),
        (lambda m, i: setattr(i["weights"], "dtype", 9), "/data/0/loss_fn_inputs/weights"),
        (lambda m, i: setattr(i["target_tokens"], "dtype", 1), "/data/0/loss_fn_inputs/target_tokens"),
        (lambda m, i: i["weights"].ClearField("dense"), "/data/0/loss_fn_inputs/weights"),
        (lambda m, i: _csr(i["weights"], crow=(0, 1)), "/data/0/loss_fn_inputs/weights"),
        (lambda m, i: _csr(i["weights"], crow=(0, 2, 1, 1)), "/data/0/loss_fn_inputs/weights"),
        (lambda m, i: _csr(i["weights"], columns=(4,)), "/data/0/loss_fn_inputs/weights"),
        (lambda m, i: _csr(i["weights"], columns=(-1,)), "/data/0/loss_fn_inputs/weights"),
        (lambda m, i: _csr(i["weights"], width=2**40), "/data/0/loss_fn_inputs/weights"),
        (lambda m, i: _csr(i["weights"]), "/data/0/loss_fn_inputs/weights"),  # not the shape of target_tokens
        (lambda m, i: m.loss_fn_config_v2["beta"].__setattr__("text", "much"), "/loss_fn_config/beta"),
    ],
)
def test_what_does_not_fit_is_refused_in_its_place(change, pointer):
    assert refused(_with(change)).pointer == pointer


def test_all_datums_have_the_same_inputs():
    whole = datum([1], target_tokens=[1], logprobs=[0.0], advantages=[1.0])
    assert refused(sent(whole, datum([1], target_tokens=[1], logprobs=[0.0]))).pointer == "/data/1/loss_fn_inputs"
    assert refused(sent(datum([1], target_tokens=[1]), datum([1], weights=[1.0]))).pointer == "/data/1/loss_fn_inputs"
    message = sent(datum([1], target_tokens=[1]), datum([1], target_tokens=[1]))
    message.data[1].loss_fn_inputs["weigths"].CopyFrom(message.data[1].loss_fn_inputs["target_tokens"])
    assert refused(message).pointer == "/data/1/loss_fn_inputs/weigths"


@pytest.mark.parametrize("without", [0, 1])
def test_a_datum_without_weights_among_others_weighs_one(without):
    message = sent(*(datum([1, 2], target_tokens=[3, 4], weights=[0.5, -2.0]) for _ in range(2)))
    del message.data[without].loss_fn_inputs["weights"]
    _, tensors, _ = asked(message)
    expected = [[0.5, -2.0], [0.5, -2.0]]
    expected[without] = [1.0, 1.0]
    assert values(tensors["weights"]) == [weight for row in expected for weight in row]


def test_a_small_sparse_request_does_not_become_a_large_one(monkeypatch):
    monkeypatch.setattr(datums, "MOST_CELLS", 1000)
    message = sent(datum(list(range(9)), target_tokens=[0] * 9))
    value = message.data[0].loss_fn_inputs["target_tokens"]
    value.sparse_csr.crow_indices = bytes(80)
    value.shape[:] = [9, 1024]
    assert refused(message).code == "too_large"


def test_a_message_that_was_cut_off_is_malformed():
    whole = sent(datum([1, 2], target_tokens=[1, 2])).SerializeToString()
    with pytest.raises(Malformed) as caught:
        messages.read(messages.ForwardBackwardRequest, whole[:-1])
    assert caught.value.code == "malformed_protobuf"


# ---------------------------------------------------------------- zstd


def test_zstd_is_bounded_by_what_it_declares_and_by_what_comes_out():
    raw = b"abc" * 1000
    declared = zstandard.ZstdCompressor().compress(raw)
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(raw)
    assert expanded(declared, LIMIT, "it") == expanded(silent, LIMIT, "it") == raw
    bomb = bytes(LIMIT + 1)
    with pytest.raises(BodyTooLarge):
        expanded(zstandard.ZstdCompressor().compress(bomb), LIMIT, "it")
    with pytest.raises(Malformed):
        expanded(zstandard.ZstdCompressor(write_content_size=False).compress(bomb), LIMIT, "it")
    for broken in (b"", b"no zstd", declared[:-3], silent[:-3], declared + declared):
        with pytest.raises(Malformed):
            expanded(broken, LIMIT, "it")


# ---------------------------------------------------------------- answers


def test_the_client_reads_log_probs_and_metrics_of_every_datum():
    log_probs = tensor(array("f", [-0.5, -0.25, -1.5]))
    head = {"metrics": {"loss:sum": 2.0, "kl": 0.5, "a:b:c": 1.0, "none": None}}
    raw = answers.forward_backward(head, {"log_probs": log_probs, "cu_seqlens": tensor(array("q", [0, 2, 3]))})
    output = deserialize_forward_backward_output(raw)
    assert [one["logprobs"].tolist() for one in output.loss_fn_outputs] == [[-0.5, -0.25], [-1.5]]
    assert output.metrics == {"loss:sum": 2.0, "kl:mean": 0.5, "a_b_c:mean": 1.0}
    combined = combine_fwd_bwd_output_results([output, output])
    assert combined.metrics["loss:sum"] == 4.0 and combined.metrics["kl:mean"] == 0.5


def test_the_client_reads_samples():
    tensors = {
        "tokens": tensor(array("i", [5, 6, 7])),
        "cu_seqlens": tensor(array("q", [0, 2, 3])),
        "log_probs": tensor(array("f", [-0.5, -0.25, -1.5])),
        "top_ids": tensor(array("i", [5, 1, 6, 2, 7, 3]), 3, 2),
        "top_log_probs": tensor(array("f", [-0.5, -2, -0.25, -3, -1.5, -4]), 3, 2),
        "prompt_log_probs": tensor(array("f", [float("nan"), -1, -2, -3])),
        "top_prompt_ids": tensor(array("i", range(8)), 4, 2),
        "top_prompt_log_probs": tensor(array("f", range(8)), 4, 2),
        "target_log_probs": tensor(array("f", [float("nan")] * 2 + [-1, float("nan"), -3, -4, -5, -6]), 4, 2),
    }
    response = deserialize_sample_response(answers.sample({"finish_reasons": ["stop", "length"]}, tensors, None))
    assert [(one.stop_reason, one.tokens, one.logprobs) for one in response.sequences] == [
        ("stop", [5, 6], [-0.5, -0.25]),
        ("length", [7], [-1.5]),
    ]
    assert response.sequences[1].topk_logprobs == [[(7, -1.5), (3, -4.0)]]
    assert response.prompt_logprobs == [None, -1.0, -2.0, -3.0]
    assert response.topk_prompt_logprobs == [None, [(2, 2.0), (3, 3.0)], [(4, 4.0), (5, 5.0)], [(6, 6.0), (7, 7.0)]]
    targets = response.target_prompt_logprobs
    assert targets is not None and targets.shape == [3, 2]
    assert targets.to_numpy().tolist() == [[-1, 0], [-3, -4], [-5, -6]]  # what was not asked for is no cell of the CSR
    short = deserialize_sample_response(answers.sample({"finish_reasons": ["stop", "length"]}, tensors, 1))
    assert short.prompt_logprobs == [None, None, None, -3.0]
    assert short.topk_prompt_logprobs == [None, None, None, [(6, 6.0), (7, 7.0)]]
