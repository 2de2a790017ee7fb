"""The order of the samples."""
import numpy as np
import pytest
from timm.data.distributed_sampler import RepeatAugSampler

from samplers import TrainSampler


def ranks(length, batch_size=4, world_size=1, epoch=0, seen=0, **kwargs):
    """List what each rank is handed."""
    handed = []
    for rank in range(world_size):
        sampler = TrainSampler(length, batch_size, rank=rank, world_size=world_size, **kwargs)
        sampler.set_position(epoch, seen)
        pairs = list(sampler)
        assert len(pairs) == len(sampler) == sampler.updates * sampler.samples_per_update // world_size
        handed.append(pairs)
    return handed


def joined(*args, **kwargs):
    """List what all ranks are handed, in the order of positions."""
    return [pair for step in zip(*ranks(*args, **kwargs), strict=True) for pair in step]


@pytest.mark.parametrize('repeats', [1, 3])
def test_order_follows_from_seed_and_epoch_alone(repeats):
    sampler = TrainSampler(300, 4, repeats=repeats, seed=5)
    first = list(sampler)
    np.random.random(3)
    assert list(sampler) == first  # independent of earlier iterations and of other generators
    sampler.set_position(1)
    second = list(sampler)
    indices = [[index for index, _ in order] for order in (first, second)]
    assert indices[0] != indices[1] and [seed for _, seed in first] != [seed for _, seed in second]
    other = joined(300, repeats=repeats, seed=6)
    assert [index for index, _ in other] != indices[0] and {s for _, s in other}.isdisjoint(s for _, s in first)
    assert len({seed for _, seed in first}) == len(first)  # copies of an image are augmented differently


@pytest.mark.parametrize('repeats', [1, 3])
@pytest.mark.parametrize('world_size', [2, 3, 8])
def test_all_world_sizes_see_a_prefix_of_one_sequence(repeats, world_size):
    one = joined(1000, repeats=repeats, batch_size=1)
    many = joined(1000, repeats=repeats, world_size=world_size)
    assert many == one[:len(many)] and len(one) - len(many) < 4 * world_size
    if repeats == 1:
        assert sorted(index for index, _ in one) == list(range(1000))


@pytest.mark.parametrize('length', [256, 300, 1000])
@pytest.mark.parametrize('world_size', [1, 2, 3, 8])
def test_repeated_augmentation_is_timms(length, world_size):
    for rank, ours in enumerate(ranks(length, batch_size=1, world_size=world_size, repeats=3, seed=7, epoch=2)):
        timms = RepeatAugSampler(range(length), num_replicas=world_size, rank=rank, num_repeats=3)
        timms.set_epoch(int(np.random.SeedSequence((7, 2)).generate_state(1)[0]))
        assert [index for index, _ in ours] == list(timms)


@pytest.mark.parametrize('length, batch_size, world_size, accum_steps, even, samples', [
    (10, 64, 1, 1, False, 10),  # the only batch stays, partial as it is
    (11, 64, 1, 1, True, 10),  # mixup pairs its images
    (11, 64, 2, 1, False, 5),
    (11, 64, 2, 1, True, 4),
    (1, 64, 1, 1, True, 2),  # the one image twice
    (3, 64, 8, 1, False, 1),
    (100, 64, 1, 2, False, 64),  # less than an optimizer step: the batches that are whole
])
def test_small_sets_give_batches(length, batch_size, world_size, accum_steps, even, samples):
    for repeats in (1, 3):
        for pairs in ranks(length, batch_size, world_size, accum_steps=accum_steps, even=even, repeats=repeats):
            assert len(pairs) == samples and all(0 <= index < length for index, _ in pairs)


@pytest.mark.parametrize('batch_size, accum_steps, world_size', [(4, 1, 1), (4, 3, 1), (5, 2, 2)])
def test_the_last_partial_step_is_dropped(batch_size, accum_steps, world_size):
    update = batch_size * accum_steps * world_size
    for length in (update, update + 1, 3 * update - 1, 3 * update):
        assert len(joined(length, batch_size, world_size, accum_steps=accum_steps)) == length // update * update


@pytest.mark.parametrize('repeats', [1, 3])
@pytest.mark.parametrize('world_size', [1, 2])
def test_a_resumed_epoch_gives_exactly_the_rest(repeats, world_size):
    options = dict(batch_size=4, world_size=world_size, accum_steps=2, repeats=repeats, epoch=3)
    whole = joined(103, **options)
    update = 8 * world_size
    for done in range(len(whole) // update + 1):
        assert joined(103, seen=done * update, **options) == whole[done * update:]


@pytest.mark.parametrize('before, after', [(2, 1), (1, 2), (2, 3)])
def test_another_number_of_ranks_resumes_with_unseen_samples(before, after):
    whole = joined(103, batch_size=1)
    for updates in (0, 1, 5):
        seen = updates * 4 * before
        rest = joined(103, world_size=after, seen=seen)
        assert rest == whole[seen:seen + len(rest)] and 103 - seen - len(rest) < 4 * after
        assert len({index for index, _ in whole[:seen] + rest}) == seen + len(rest)  # each once
