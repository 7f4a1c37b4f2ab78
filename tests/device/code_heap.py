# What is on the heap, from before the package is imported to the middle of a fit. Run on boards by tests/code_heap.py.
import gc


def used():
    gc.collect()
    gc.collect()
    return gc.mem_alloc()


def main(path):
    target = 0
    before = used()
    import ulearn

    model = ulearn.load(path)
    print("loaded", used() - before)
    if not model.trainings:
        return
    trainer = ulearn.Trainer(model)
    x = bytes(model.input_bytes)
    if not model.labelled:
        target = bytes(model.target_bytes)
    trainer.step(x, target)
    model.predict(x)
    print("stepped", used() - before)
    samples = ulearn.Samples(model, 2)
    samples.add(x, target)
    samples.add(x, target)

    def progress(done, total):
        if done == total:
            print("fitting", used() - before)

    trainer.fit(samples, 1, progress)
