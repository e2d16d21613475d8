//! A bar of characters for a number of sessions, with the server's limit at its end.

const WIDEST: usize = 60;

pub(crate) struct Scale {
    slots: usize,
    /// The number of sessions per character.
    unit: usize,
}

impl Scale {
    pub(crate) fn new(slots: usize) -> Self {
        Self { slots, unit: slots.div_ceil(WIDEST).max(1) }
    }

    pub(crate) fn unit(&self) -> usize {
        self.unit
    }

    /// `####......|  4`
    pub(crate) fn bar(&self, sessions: usize) -> String {
        let (taken, all) = (sessions.div_ceil(self.unit), self.slots.div_ceil(self.unit));
        format!("{}{}|{sessions:>4}", "#".repeat(taken), ".".repeat(all.saturating_sub(taken)))
    }
}
