"""Keras in a process of its own: `python keras_worker.py torch|numpy|tf_keras`.

A process can have one of Keras's backends only. This one reads pickled requests from its standard
input, runs each on a real layer and writes a pickled answer; see `keras_dialect.py` for both.
"""

from __future__ import annotations

import inspect
import os
import pickle
import sys
from typing import Any

import numpy as np

BACKEND = sys.argv[1]
ANSWERS = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # whatever a library prints goes elsewhere
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
INPUTS = ("query", "value", "key")

if BACKEND == "tf_keras":
    import tensorflow as tf
    import tf_keras as keras
else:
    os.environ["KERAS_BACKEND"] = BACKEND
    import keras
    from keras.src import backend

    if BACKEND == "torch":
        import torch


def tensor(array: Any) -> Any:
    """Return an array as the backend's, a leaf where there are gradients."""
    if array is None or BACKEND == "numpy":
        return array
    if BACKEND == "tf_keras":
        return tf.constant(array)
    leaf = torch.from_numpy(array.copy())
    return leaf.requires_grad_(leaf.is_floating_point())


def array(value: Any) -> Any:
    """Return what a layer returned as NumPy's."""
    if value is None or BACKEND == "numpy":
        return value
    return value.numpy() if BACKEND == "tf_keras" else value.detach().numpy().copy()


def hang(value: Any, mask: Any) -> None:
    """Hang a mask on an input, as a layer before would."""
    if BACKEND == "tf_keras":
        value._keras_mask = tf.constant(mask)
    else:
        backend.set_keras_mask(value, tensor(mask))


def built(request: dict[str, Any], inputs: dict[str, Any]) -> Any:
    """Return the layer with drawn weights; biases are 0 otherwise, where a wrong one hides."""
    layer = getattr(keras.layers, request["layer"])(**request["named"], dtype=request["dtype"])
    if BACKEND == "tf_keras":
        layer(**inputs)  # makes the weights, by their full names
    else:
        layer.build(*(None if x is None else tuple(x.shape) for x in inputs.values()))
    draw = np.random.default_rng(request["seed"]).normal
    weights = [draw(size=w.shape).astype(request["dtype"]) for w in layer.get_weights()]
    layer.set_weights(weights)
    return layer


def watched(layer: Any) -> list[Any]:
    """Return a list that takes the keep mask that Keras's own dropout draws in a call."""
    kept: list[Any] = []
    own = layer._dropout_layer.call

    def call(weights: Any, training: Any = False) -> Any:
        dropped = own(weights, training=training)
        # a weight that is 0 before dropout shows nothing, and nothing hangs on it
        kept.append(np.asarray(array(dropped)) != 0)
        return dropped

    layer._dropout_layer.call = call
    return kept


def gradients(layer: Any, inputs: dict[str, Any], results: Any, cotangents: Any, tape: Any) -> Any:
    """Return the gradients of the inputs by name, and of the weights in Keras's order."""
    leaves = {name: leaf for name, leaf in inputs.items() if leaf is not None}
    pairs = [(r, c) for r, c in zip(results, cotangents, strict=True) if r is not None]
    if BACKEND == "tf_keras":
        found = tape.gradient(
            [r for r, _ in pairs],
            [*leaves.values(), *layer.trainable_weights],
            output_gradients=[tf.constant(c) for _, c in pairs],
            unconnected_gradients="zero",
        )
    else:
        found = torch.autograd.grad(
            [r for r, _ in pairs],
            [*leaves.values(), *(w.value for w in layer.trainable_weights)],
            [torch.from_numpy(c) for _, c in pairs],
            materialize_grads=True,
        )
    found = [array(gradient) for gradient in found]
    return dict(zip(leaves, found, strict=False)), found[len(leaves) :]


def about(name: str) -> dict[str, Any]:
    """Return a layer's parameters with their defaults, and the names of its weights."""
    layer = getattr(keras.layers, name)
    parameters = {
        n: {
            p.name: p.default
            for p in inspect.signature(f).parameters.values()
            if p.kind != p.VAR_KEYWORD
        }
        for n, f in (("init", layer), ("call", layer.call))
    }
    return parameters | {"version": keras.__version__}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run a request."""
    if "about" in request:
        return about(request["about"])
    inputs = {name: tensor(request["inputs"].get(name)) for name in INPUTS}
    options = {
        name: tensor(option) if isinstance(option, np.ndarray) else option
        for name, option in request["options"].items()
    }
    layer = built(request, inputs)
    kept = watched(layer)
    for name, mask in request["hung"].items():
        hang(inputs[name], mask)
    tape = tf.GradientTape(persistent=True) if BACKEND == "tf_keras" else None
    if tape is None:
        returned = layer(**inputs, **options)
    else:
        with tape:
            for leaf in inputs.values():
                if leaf is not None:
                    tape.watch(leaf)
            returned = layer(**inputs, **options)
    results = returned if isinstance(returned, tuple) else (returned, None)
    draw = np.random.default_rng(request["seed"] + 1).normal
    cotangents = [
        None if r is None else draw(size=tuple(r.shape)).astype(request["dtype"]) for r in results
    ]
    found = {
        "weights": [np.asarray(w) for w in layer.get_weights()],
        "names": [w.path if hasattr(w, "path") else w.name for w in layer.weights],
        "output": array(results[0]),
        "scores": array(results[1]),
        "keep": kept[0] if kept else None,
        "cotangents": cotangents,
    }
    if BACKEND != "numpy":
        found["gradients"] = gradients(layer, inputs, results, cotangents, tape)
    return found


def main() -> None:
    """Answer until the input ends."""
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            found: Any = answer(request)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        pickle.dump(found, ANSWERS)
        ANSWERS.flush()


main()
