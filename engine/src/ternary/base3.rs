//! Five trits in a byte: `n = 81 c0 + 27 c1 + 9 c2 + 3 c3 + c4`, stored as `ceil(256 n / 243)`.
//!
//! Stored that way a byte is a fraction of one in 8 bits, so that a multiplication by 3 carries the next code out at the top: how the
//! readers with vector instructions take it apart. 243 of the 256 bytes are such a fraction. No writer makes the other 13, so they are
//! damage.

/// Marks a byte that stands for no trits.
pub(super) const NO_TRITS: i8 = 2;

/// The byte of five codes (0, 1, 2), the most significant first.
pub(super) const fn encode(codes: [u8; 5]) -> u8 {
    let mut n = 0u32;
    let mut i = 0;
    while i < 5 {
        n = n * 3 + codes[i] as u32;
        i += 1;
    }
    (n * 256).div_ceil(243) as u8
}

/// The trits of every byte, the most significant first; [`NO_TRITS`] five times for a byte that has none.
pub(super) static TRITS: [[i8; 5]; 256] = {
    let mut table = [[NO_TRITS; 5]; 256];
    let mut n = 0usize;
    while n < 243 {
        let codes = [n / 81, n / 27 % 3, n / 9 % 3, n / 3 % 3, n % 3];
        let mut trits = [0i8; 5];
        let mut bytes = [0u8; 5];
        let mut i = 0;
        while i < 5 {
            trits[i] = codes[i] as i8 - 1;
            bytes[i] = codes[i] as u8;
            i += 1;
        }
        table[encode(bytes) as usize] = trits;
        n += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_what_repeated_multiplication_by_three_gives() {
        let mut valid = 0;
        for byte in 0..=255u8 {
            let trits = TRITS[byte as usize];
            if trits[0] == NO_TRITS {
                continue;
            }
            valid += 1;
            let mut rest = byte;
            for trit in trits {
                let carried = (u16::from(rest) * 3) >> 8;
                rest = rest.wrapping_mul(3);
                assert_eq!(carried as i8 - 1, trit, "byte {byte}");
            }
            assert_eq!(encode(trits.map(|t| (t + 1) as u8)), byte);
        }
        assert_eq!(valid, 243);
    }
}
