//! A row-major `[rows, width]` output whose columns are written by several threads.

/// Shared access to a matrix; the callers see to it that no two touch the same element.
pub(crate) struct Columns<T = f32> {
    data: *mut T,
    len: usize,
    width: usize,
}

impl<T> Clone for Columns<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Columns<T> {}

// SAFETY: `slice` is the only access, and its contract rules out that two threads hold the same element.
unsafe impl<T: Send> Send for Columns<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Columns<T> {}

impl<T> Columns<T> {
    /// A matrix of `width` columns over `data`.
    pub(crate) fn new(data: &mut [T], width: usize) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), width }
    }

    /// Elements `first .. first + count` of row `row`.
    ///
    /// # Safety
    /// The slice given to [`Self::new`] is still borrowed for the caller, and no other live slice overlaps this one.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, row: usize, first: usize, count: usize) -> &mut [T] {
        let start = row * self.width + first;
        assert!(first + count <= self.width && start + count <= self.len, "a slice inside the matrix");
        // SAFETY: in bounds by the assertion, unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), count) }
    }
}
