//! Attention around the sizes of its vectors, heads and pages. The check itself is that of the tests by chance.

use crate::kernels::guarded::Place;
use crate::kernels::tests::{Attention, check_attention};

#[test]
fn every_number_of_positions() {
    let totals = (1..=17).chain([31, 32, 33, 47, 48, 49]).chain(62..=66).chain([80, 81, 127, 128, 129, 193]);
    for (turn, total) in totals.enumerate() {
        for group in [1, 5] {
            let place = Place::any::<f32>(turn * 2 + group);
            check_attention(Attention { total, d: 18, group, part: 18, place, seed: turn as u64 });
        }
    }
}

/// Every width, and every part of one.
#[test]
fn every_number_of_dimensions() {
    for d in (1..=40).chain([47, 48, 49, 63, 64, 65, 80, 96, 127, 128, 129]) {
        for part in [1 + d * 7 % 40, 16, 17] {
            check_attention(Attention {
                total: 21,
                d,
                group: 3,
                part,
                place: Place::any::<f32>(d + part),
                seed: d as u64,
            });
        }
    }
}

#[test]
fn every_number_of_heads_at_every_offset() {
    for group in 1..=9 {
        check_attention(Attention { total: 65, d: 34, group, part: 24, place: Place::End, seed: group as u64 });
    }
    for place in Place::all::<f32>() {
        check_attention(Attention { total: 66, d: 20, group: 4, part: 7, place, seed: 1 });
    }
}
