# ulearn: on-device learning for MicroPython.
#
#   model = ulearn.load("digits.ulm")
#   trainer = ulearn.Trainer(model)
#   trainer.step(x, label)
#   print(model.predict(x))
__version__ = "0.2.0"

_PLACES = {
    "load": "model",
    "Model": "model",
    "Trainer": "trainer",
    "Samples": "samples",
    "Agent": "agent",
}


def __getattr__(name):
    # A board that only infers never pays for the trainer: each part is imported when it is first asked for.
    if name == "executor":
        from .which import find

        value = find()
    elif name in _PLACES:
        module = __import__("ulearn." + _PLACES[name], None, None, (name,))
        value = getattr(module, name)
    else:
        raise AttributeError("module 'ulearn' has no attribute '%s'" % name)
    globals()[name] = value
    return value
