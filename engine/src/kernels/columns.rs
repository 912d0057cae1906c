//! A row-major `[rows, width]` output whose columns are written by several threads.

/// Shared access to a matrix; the callers see to it that no two touch the same element.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    data: *mut f32,
    len: usize,
    width: usize,
}

// SAFETY: `slice` is the only access, and its contract rules out that two threads hold the same element.
unsafe impl Send for Columns {}
// SAFETY: as above.
unsafe impl Sync for Columns {}

impl Columns {
    /// A matrix of `width` columns over `data`.
    pub(super) fn new(data: &mut [f32], width: usize) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), width }
    }

    /// Elements `first .. first + count` of row `row`.
    ///
    /// # Safety
    /// The slice given to [`Self::new`] is still borrowed for the caller, and no other live slice overlaps this one.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn slice(&self, row: usize, first: usize, count: usize) -> &mut [f32] {
        let start = row * self.width + first;
        assert!(first + count <= self.width && start + count <= self.len, "a slice inside the matrix");
        // SAFETY: in bounds by the assertion, unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), count) }
    }
}
