//! `as_chunks` and `as_chunks_mut` of the standard library, which came with Rust 1.88: the compilers of distributions are older, and
//! those are what builds and tests the kernels for other machines (`ci/aarch64.sh`).

/// Splits `slice` into arrays of `N` and what is left over.
#[inline(always)]
pub(crate) fn as_chunks<const N: usize, T>(slice: &[T]) -> (&[[T; N]], &[T]) {
    const { assert!(N != 0, "chunks have elements") };
    let count = slice.len() / N;
    // SAFETY: `count * N` is at most the slice's length; an array of `N` lies in memory as `N` elements do, and `body` holds
    // `count` times as many.
    unsafe {
        let (body, tail) = slice.split_at_unchecked(count * N);
        (std::slice::from_raw_parts(body.as_ptr().cast(), count), tail)
    }
}

/// As [`as_chunks`], to write to.
#[inline(always)]
pub(crate) fn as_chunks_mut<const N: usize, T>(slice: &mut [T]) -> (&mut [[T; N]], &mut [T]) {
    const { assert!(N != 0, "chunks have elements") };
    let count = slice.len() / N;
    // SAFETY: as above, and `body`, which nobody else has, is given up for the arrays.
    unsafe {
        let (body, tail) = slice.split_at_mut_unchecked(count * N);
        (std::slice::from_raw_parts_mut(body.as_mut_ptr().cast(), count), tail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_and_their_rest_are_those_of_chunks_exact() {
        for len in 0..20u32 {
            let mut numbers: Vec<u32> = (0..len).collect();
            let exact: Vec<[u32; 4]> = numbers.chunks_exact(4).map(|c| c.try_into().unwrap()).collect();
            let rest = numbers.chunks_exact(4).remainder().to_vec();
            assert_eq!(as_chunks(&numbers), (&exact[..], &rest[..]));
            let (body, tail) = as_chunks_mut::<4, _>(&mut numbers);
            body.iter_mut().for_each(|four| four.reverse());
            assert_eq!((body.len(), &*tail), (exact.len(), &rest[..]));
            assert!(numbers.iter().zip(exact.as_flattened()).enumerate().all(|(i, (n, _))| *n == (i ^ 3) as u32));
        }
    }
}
