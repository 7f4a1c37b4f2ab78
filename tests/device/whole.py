# All that training takes, in a heap of so many bytes: package, kernels, plan, samples. Run by tests/test_memory.py.
import gc


def ballast(heap):
    # Takes what the heap has beyond `heap` bytes, so that the rest is a heap of that size.
    gc.collect()
    return bytearray(max(0, gc.mem_alloc() + gc.mem_free() - heap))


def main(path, heap, frozen, clips, epochs):
    weight = ballast(heap)
    import ulearn

    model = ulearn.load(path, frozen=frozen)
    trainer = ulearn.Trainer(model, learning_rate=0.01, skip=0)
    samples = ulearn.Samples(model, clips)
    x = bytearray(model.input_bytes)
    with open("clips.bin", "rb") as f:
        for _ in range(clips):
            label = f.read(1)[0]
            f.readinto(x)
            samples.add(x, label)
    before = bytes(model.output(x))
    trainer.fit(samples, epochs)
    gc.collect()
    gc.collect()
    used = gc.mem_alloc() - len(weight)
    print("whole", used, gc.mem_free(), trainer.counters()[0], bytes(model.output(x)) != before)
