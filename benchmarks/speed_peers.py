"""The networks that `speed.py` compares with, in the shape their authors published them, with random weights.

Each takes one tensor that holds what it reads of a batch of 10 s recordings.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class NotInstalled(Exception):
    """A package that a peer needs is not there; the message says which, and how to get it."""


class Peer(nn.Module):
    """A network, and in words what it reads of a 12-lead recording of 10 s."""

    def __init__(
        self, input_words: str, net: nn.Module, call: Callable[[nn.Module, Tensor], Any] | None = None
    ) -> None:
        super().__init__()
        self.input_words, self.net, self.call = input_words, net, call

    def forward(self, x: Tensor) -> Any:
        return self.net(x) if self.call is None else self.call(self.net, x)


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotInstalled(f"pip install {package} ({error})") from error


def _without_weight_norm(net: nn.Module) -> nn.Module:
    """The same function, its weights computed once instead of in every call."""
    with torch.inference_mode(False):
        for module in list(net.modules()):
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
    return net


def torch_ecg_crnn() -> Peer:
    """ECG_CRNN of torch_ecg with the residual network of its examples, 500 Hz."""
    models, configs = _module("torch_ecg.models", "torch-ecg"), _module("torch_ecg.model_configs", "torch-ecg")
    config = configs.ECG_CRNN_CONFIG
    config.cnn.name = "resnet_nature_comm_bottle_neck_se"
    return Peer("12 x 5000 at 500 Hz", models.ECG_CRNN(classes=[str(i) for i in range(26)], n_leads=12, config=config))


def hubert_ecg(hidden: int, layers: int, heads: int) -> Peer:
    """HuBERT-ECG (Coppola et al. 2024): two windows of 5 s, the twelve leads one after the other, at 100 Hz."""
    from transformers import HubertConfig, HubertModel

    config = HubertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        conv_dim=(512,) * 5,
        conv_kernel=(10, 3, 3, 2, 2),
        conv_stride=(4, 2, 2, 2, 2),
    )
    return Peer("2 x 6000 at 100 Hz", _without_weight_norm(HubertModel(config)))


class EcgFmShape(nn.Module):
    """ECG-FM (McKeen et al. 2024): wav2vec 2.0 on two windows of 5 s, whose first convolution reads twelve leads."""

    def __init__(self) -> None:
        from transformers import Wav2Vec2Config, Wav2Vec2Model

        super().__init__()
        config = Wav2Vec2Config(conv_dim=(256,) * 4, conv_kernel=(2,) * 4, conv_stride=(2,) * 4)
        self.model = Wav2Vec2Model(config)
        self.model.feature_extractor.conv_layers[0].conv = nn.Conv1d(12, 256, 2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model.feature_extractor.conv_layers:
            x = layer(x)
        return self.model.encoder(self.model.feature_projection(x.transpose(1, 2))[0])[0]


def ecg_fm() -> Peer:
    """See `EcgFmShape`."""
    return Peer("2 x 12 x 2500 at 500 Hz", _without_weight_norm(EcgFmShape()))


def chronos_2() -> Peer:
    """Chronos-2 (Ansari et al. 2025), the encoder that its embeddings come from, twelve leads as one group."""
    module = _module("chronos.chronos2", "chronos-forecasting")
    config = module.Chronos2CoreConfig(
        d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, dense_act_fn="relu", reg_token_id=1
    )
    config.chronos_config = {
        "context_length": 8192,
        "input_patch_size": 16,
        "input_patch_stride": 16,
        "output_patch_size": 16,
        "quantiles": [i / 20 for i in range(1, 20)] + [0.01, 0.99],
        "use_reg_token": True,
        "use_arcsinh": True,
        "max_output_patches": 64,
        "time_encoding_scale": 8192,
    }

    def encode(net: Any, x: Tensor) -> Any:
        records = torch.arange(len(x) // 12, device=x.device).repeat_interleave(12)
        return net.encode(x, group_ids=records)[0]

    return Peer("12 grouped x 1000 at 100 Hz", module.Chronos2Model(config), encode)


# Name to the shape of one record's input, the first axis of which grows with the batch, and how to build it.
PEERS: dict[str, tuple[tuple[int, ...], Callable[[], Peer]]] = {
    "torch_ecg CRNN": ((1, 12, 5000), torch_ecg_crnn),
    "HuBERT-ECG small, its shape": ((2, 6000), lambda: hubert_ecg(512, 8, 8)),
    "HuBERT-ECG base, its shape": ((2, 6000), lambda: hubert_ecg(768, 12, 12)),
    "ECG-FM, its shape": ((2, 12, 2500), ecg_fm),
    "Chronos-2, its shape": ((12, 1000), chronos_2),
}


class OnnxModel:
    """An exported ECG-MoE in ONNX Runtime, on one thread."""

    def __init__(self, path: Path) -> None:
        runtime = _module("onnxruntime", "onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [node.name for node in self.session.get_inputs()]

    def __call__(self, inputs: dict[str, Tensor]) -> Any:
        """Answer a batch; inputs the graph does not have are left out."""
        return self.session.run(None, {name: inputs[name].numpy() for name in self.names})
