//! The bulk of a sum: 32 bytes at a time, with AVX2 where the CPU has it.

#![expect(unsafe_code, reason = "vectors are loaded through pointers, and AVX2 has to be there")]

/// The sum of as many whole blocks as there are, and what is left.
#[inline]
pub(super) fn sum(data: &[u8]) -> (u64, &[u8]) {
    let (blocks, rest) = data.as_chunks::<32>();
    #[cfg(target_arch = "x86_64")]
    if blocks.len() > 2 && std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has just been asked for AVX2.
        return (unsafe { avx2::sum(blocks) }, rest);
    }
    (plain(blocks), rest)
}

/// Copies as many whole blocks as there are in `data` to the start of `buffer`; gives their sum and how many bytes
/// they have.
#[inline]
pub(super) fn copy(data: &[u8], room: &mut [u8]) -> (u64, usize) {
    let (blocks, _) = data.as_chunks::<32>();
    let done = blocks.len() * 32;
    #[cfg(target_arch = "x86_64")]
    if blocks.len() > 2 && std::arch::is_x86_feature_detected!("avx2") {
        let (room, _) = room[..done].as_chunks_mut::<32>();
        // SAFETY: the CPU has just been asked for AVX2.
        return (unsafe { avx2::copy(blocks, room) }, done);
    }
    room[..done].copy_from_slice(&data[..done]);
    (plain(blocks), done)
}

/// Words of eight bytes with their carries: an addition and one of the carry each. Several sums side by side,
/// since otherwise each addition waits for the one before.
#[inline]
fn plain(blocks: &[[u8; 32]]) -> u64 {
    let [mut a, mut b, mut c, mut d] = [0u128; 4];
    for block in blocks {
        let (words, _) = block.as_chunks::<8>();
        a += u128::from(u64::from_ne_bytes(words[0]));
        b += u128::from(u64::from_ne_bytes(words[1]));
        c += u128::from(u64::from_ne_bytes(words[2]));
        d += u128::from(u64::from_ne_bytes(words[3]));
    }
    let total = a + b + c + d;
    // What is carried out of any multiple of 16 bits counts 1.
    (total as u64 & 0xffff_ffff) + (total as u64 >> 32) + (total >> 64) as u64
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256i, _mm256_add_epi64, _mm256_loadu_si256, _mm256_setzero_si256, _mm256_storeu_si256,
        _mm256_unpackhi_epi32, _mm256_unpacklo_epi32,
    };

    #[target_feature(enable = "avx2")]
    pub(super) fn sum(blocks: &[[u8; 32]]) -> u64 {
        let mut sums = Sums::new();
        let (pairs, rest) = blocks.as_chunks::<2>();
        for [first, second] in pairs {
            sums.add(load(first), load(second));
        }
        for block in rest {
            sums.add(load(block), _mm256_setzero_si256());
        }
        sums.total()
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn copy(blocks: &[[u8; 32]], room: &mut [[u8; 32]]) -> u64 {
        let mut sums = Sums::new();
        let ((pairs, rest), (places, last)) = (blocks.as_chunks::<2>(), room.as_chunks_mut::<2>());
        for ([first, second], [one, other]) in pairs.iter().zip(places) {
            let (first, second) = (load(first), load(second));
            store(one, first);
            store(other, second);
            sums.add(first, second);
        }
        for (block, place) in rest.iter().zip(last) {
            let block = load(block);
            store(place, block);
            sums.add(block, _mm256_setzero_si256());
        }
        sums.total()
    }

    /// Sums of words of four bytes in lanes of eight: no carry is lost in the length of any packet. Several side
    /// by side, so that none waits for another.
    struct Sums([__m256i; 4]);

    impl Sums {
        #[target_feature(enable = "avx2")]
        fn new() -> Self {
            Self([_mm256_setzero_si256(); 4])
        }

        #[target_feature(enable = "avx2")]
        fn add(&mut self, first: __m256i, second: __m256i) {
            let zero = _mm256_setzero_si256();
            let Self([a, b, c, d]) = self;
            *a = _mm256_add_epi64(*a, _mm256_unpacklo_epi32(first, zero));
            *b = _mm256_add_epi64(*b, _mm256_unpackhi_epi32(first, zero));
            *c = _mm256_add_epi64(*c, _mm256_unpacklo_epi32(second, zero));
            *d = _mm256_add_epi64(*d, _mm256_unpackhi_epi32(second, zero));
        }

        #[target_feature(enable = "avx2")]
        fn total(self) -> u64 {
            let Self([a, b, c, d]) = self;
            let mut lanes = [0; 32];
            store(&mut lanes, _mm256_add_epi64(_mm256_add_epi64(a, b), _mm256_add_epi64(c, d)));
            let (lanes, _) = lanes.as_chunks::<8>();
            lanes.iter().map(|lane| u64::from_ne_bytes(*lane)).sum()
        }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn load(block: &[u8; 32]) -> __m256i {
        // SAFETY: a block has the 32 bytes that are read, and need not be aligned for this load.
        unsafe { _mm256_loadu_si256(block.as_ptr().cast::<__m256i>()) }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn store(place: &mut [u8; 32], block: __m256i) {
        // SAFETY: a block has the 32 bytes that are written, and need not be aligned for this store.
        unsafe { _mm256_storeu_si256(place.as_mut_ptr().cast::<__m256i>(), block) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::checksum::fold;
    use proptest::prelude::*;

    proptest! {
        /// On a CPU with AVX2 this compares both ways; elsewhere there is only one.
        #[test]
        fn both_ways_give_the_same_sum(data in prop::collection::vec(any::<u8>(), 0..2000), full in any::<bool>()) {
            let data = if full { vec![0xff; data.len()] } else { data };
            let (total, rest) = sum(&data);
            prop_assert_eq!(rest.len(), data.len() % 32);
            let blocks = data.as_chunks::<32>().0;
            prop_assert_eq!(fold(total), fold(plain(blocks)));
        }
    }
}
