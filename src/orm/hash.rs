//! How keys are hashed.
//!
//! Keys come from outside, so nobody may be able to choose some that collide: the seed is the process's own. Most keys are one integer,
//! for which the standard library's SipHash is most of a look-up. An integer is hashed by `(a * x + b) >> 64` of 128 bits with random
//! `a` and `b`, of which any two integers collide with the chance of two random numbers. Bytes go through SipHash, as before.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::OnceLock;

pub(super) type KeyMap<K, V> = HashMap<K, V, Keys>;

#[derive(Debug, Clone, Copy)]
pub(super) struct Keys(&'static Seed);

#[derive(Debug)]
struct Seed {
    factor: u128,
    summand: u128,
    bytes: RandomState,
}

#[derive(Debug)]
pub(super) struct KeyHasher {
    seed: &'static Seed,
    state: u64,
}

impl Default for Keys {
    fn default() -> Self {
        static SEED: OnceLock<Seed> = OnceLock::new();
        Self(SEED.get_or_init(|| {
            let random =
                || u128::from(RandomState::new().hash_one(0)) << 64 | u128::from(RandomState::new().hash_one(1));
            Seed { factor: random(), summand: random(), bytes: RandomState::new() }
        }))
    }
}

impl BuildHasher for Keys {
    type Hasher = KeyHasher;

    #[inline]
    fn build_hasher(&self) -> KeyHasher {
        KeyHasher { seed: self.0, state: 0 }
    }
}

impl KeyHasher {
    #[inline]
    fn mix(&mut self, part: u64) {
        let Seed { factor, summand, .. } = self.seed;
        let mixed = factor.wrapping_mul(u128::from(self.state ^ part)).wrapping_add(*summand);
        self.state = (mixed >> 64) as u64;
    }
}

macro_rules! integers {
    ($($write:ident($integer:ty)),+) => { $(
        #[inline]
        fn $write(&mut self, part: $integer) {
            self.mix(part as u64);
        }
    )+ };
}

impl Hasher for KeyHasher {
    #[inline]
    fn finish(&self) -> u64 {
        self.state
    }

    fn write(&mut self, bytes: &[u8]) {
        let mut hasher = self.seed.bytes.build_hasher();
        hasher.write(bytes);
        self.mix(hasher.finish());
    }

    #[inline]
    fn write_u128(&mut self, part: u128) {
        self.mix(part as u64);
        self.mix((part >> 64) as u64);
    }

    #[inline]
    fn write_i128(&mut self, part: i128) {
        self.write_u128(part as u128);
    }

    integers!(
        write_u8(u8),
        write_u16(u16),
        write_u32(u32),
        write_u64(u64),
        write_usize(usize),
        write_i8(i8),
        write_i16(i16),
        write_i32(i32),
        write_i64(i64),
        write_isize(isize)
    );
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn neighbours_and_multiples_are_spread_over_both_ends_of_the_hash() {
        let keys = Keys::default();
        for step in [1_u64, 2, 1000, 1 << 20, 1 << 32, 1 << 40] {
            let hashes: Vec<u64> = (0..4096).map(|key| keys.hash_one(key * step)).collect();
            let low: HashSet<u64> = hashes.iter().map(|hash| hash & 0xffff).collect();
            let high: HashSet<u64> = hashes.iter().map(|hash| hash >> 48).collect();
            // Some 3970 of 4096 for random numbers; an unlucky factor may lose some.
            assert!(low.len() > 1000 && high.len() > 1000, "{step}: {} and {}", low.len(), high.len());
        }
    }

    #[test]
    fn every_part_of_a_key_counts() {
        let keys = Keys::default();
        let hash = |key: (i32, &str)| keys.hash_one(key);
        assert_eq!(hash((1, "a")), hash((1, "a")));
        assert_ne!(hash((1, "a")), hash((2, "a")));
        assert_ne!(hash((1, "a")), hash((1, "b")));
        assert_ne!(keys.hash_one((1, 2)), keys.hash_one((2, 1)));
        assert_ne!(keys.hash_one(1_u128), keys.hash_one(1_u128 << 64));
    }
}
