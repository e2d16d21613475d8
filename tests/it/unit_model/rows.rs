//! Rows as the model has them, and what the database's constraints do to them.

use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    User,
    Post,
    Comment,
    Badge,
    Node,
    Link,
    Counter,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Column {
    Parent,
    Code,
    N,
    M,
}

/// What becomes of a row when its parent is deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OnDelete {
    Cascade,
    SetNull,
    Refuse,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Row {
    pub parent: Option<i32>,
    pub code: Option<i32>,
    pub n: i32,
    pub m: i32,
    pub version: i32,
}

pub type Key = (Table, i32);

/// The content of all tables.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rows(pub BTreeMap<Key, Row>);

impl Default for Row {
    fn default() -> Self {
        Self { parent: None, code: None, n: 0, m: 0, version: 1 }
    }
}

impl Row {
    pub fn get(&self, column: Column) -> Option<i32> {
        match column {
            Column::Parent => self.parent,
            Column::Code => self.code,
            Column::N => Some(self.n),
            Column::M => Some(self.m),
        }
    }

    pub fn set(&mut self, column: Column, value: Option<i32>) {
        match column {
            Column::Parent => self.parent = value,
            Column::Code => self.code = value,
            Column::N => self.n = value.expect("not nullable"),
            Column::M => self.m = value.expect("not nullable"),
        }
    }
}

impl Table {
    pub const ALL: [Self; 7] =
        [Self::User, Self::Post, Self::Comment, Self::Badge, Self::Node, Self::Link, Self::Counter];

    pub fn name(self) -> &'static str {
        match self {
            Self::User => "users",
            Self::Post => "posts",
            Self::Comment => "comments",
            Self::Badge => "badges",
            Self::Node => "nodes",
            Self::Link => "links",
            Self::Counter => "counters",
        }
    }

    pub fn named(name: &str) -> Self {
        Self::ALL.into_iter().find(|table| table.name() == name).expect("a table of the model")
    }

    pub fn parent(self) -> Option<Self> {
        self.on_delete().map(|(parent, _)| parent)
    }

    fn on_delete(self) -> Option<(Self, OnDelete)> {
        match self {
            Self::Post => Some((Self::User, OnDelete::Cascade)),
            Self::Comment => Some((Self::Post, OnDelete::Cascade)),
            Self::Badge => Some((Self::User, OnDelete::SetNull)),
            Self::Node => Some((Self::Node, OnDelete::Cascade)),
            Self::Link => Some((Self::Link, OnDelete::Refuse)),
            Self::User | Self::Counter => None,
        }
    }

    /// Whether a row need not have a parent.
    pub fn may_be_alone(self) -> bool {
        !matches!(self, Self::Post | Self::Comment)
    }

    pub fn is_versioned(self) -> bool {
        self == Self::Counter
    }

    /// Whether the database makes the key.
    pub fn is_counted(self) -> bool {
        matches!(self, Self::Post | Self::Node)
    }

    pub fn has(self, column: Column) -> bool {
        match column {
            Column::Parent => self.parent().is_some(),
            Column::Code => matches!(self, Self::User | Self::Node),
            Column::N | Column::M => true,
        }
    }

    /// Whether a row of this table can change when one of `table` is deleted.
    pub fn descends_from(self, table: Self) -> bool {
        match self.parent() {
            Some(parent) => parent == table || (parent != self && parent.descends_from(table)),
            None => false,
        }
    }
}

impl Rows {
    pub fn get(&self, key: Key) -> Option<&Row> {
        self.0.get(&key)
    }

    pub fn of(&self, table: Table) -> impl Iterator<Item = i32> {
        self.0.keys().filter(move |(other, _)| *other == table).map(|(_, id)| *id)
    }

    fn children(&self, key: Key) -> Vec<Key> {
        let of = |(other, row): &(&Key, &Row)| other.0.parent() == Some(key.0) && row.parent == Some(key.1);
        self.0.iter().filter(of).map(|(other, _)| *other).collect()
    }

    /// Deletes a row and does what that does to others; those that refuse it are left behind, which is a violation.
    pub fn delete(&mut self, key: Key) {
        if self.0.remove(&key).is_none() {
            return;
        }
        for child in self.children(key) {
            match child.0.on_delete() {
                Some((_, OnDelete::Cascade)) => self.delete(child),
                Some((_, OnDelete::SetNull)) => {
                    if let Some(row) = self.0.get_mut(&child) {
                        row.parent = None;
                    }
                }
                Some((_, OnDelete::Refuse)) | None => {}
            }
        }
    }

    /// Whether a constraint does not hold.
    pub fn violates(&self) -> bool {
        let mut codes = BTreeSet::new();
        self.0.iter().any(|((table, _), row)| {
            let taken = row.code.is_some_and(|code| !codes.insert((*table, code)));
            let orphan = match (table.parent(), row.parent) {
                (Some(parent), Some(id)) => !self.0.contains_key(&(parent, id)),
                (Some(_), None) => !table.may_be_alone(),
                (None, _) => false,
            };
            taken || orphan
        })
    }

    /// Whether `ancestor` is among the ancestors of a row, or is that row.
    pub fn comes_from(&self, key: Key, ancestor: Key) -> bool {
        let mut seen = BTreeSet::new();
        let mut next = Some(key);
        while let Some(key) = next.filter(|key| seen.insert(*key)) {
            if key == ancestor {
                return true;
            }
            let parent = self.get(key).and_then(|row| row.parent);
            next = key.0.parent().zip(parent);
        }
        false
    }

    /// What differs, for people.
    pub fn difference(&self, other: &Self) -> String {
        let keys: BTreeSet<&Key> = self.0.keys().chain(other.0.keys()).collect();
        let differ = keys.into_iter().filter(|key| self.get(**key) != other.get(**key));
        differ
            .map(|key| format!("\n  {} {}: {} | {}", key.0.name(), key.1, told(self.get(*key)), told(other.get(*key))))
            .collect()
    }
}

pub fn told(row: Option<&Row>) -> String {
    let Some(row) = row else { return "none".into() };
    let text = |name: &str, value: Option<i32>| value.map(|value| format!("{name} {value}, ")).unwrap_or_default();
    let version = if row.version > 1 { format!(", version {}", row.version) } else { String::new() };
    format!("{}{}n {}, m {}{version}", text("parent", row.parent), text("code", row.code), row.n, row.m)
}

/// What every program begins with.
pub fn first_rows() -> Rows {
    let row = |parent: Option<i32>, code: Option<i32>| Row { parent, code, ..Row::default() };
    let rows = [
        ((Table::User, 1), row(None, Some(1))),
        ((Table::User, 2), row(None, Some(2))),
        ((Table::Post, 1), row(Some(1), None)),
        ((Table::Comment, 1), row(Some(1), None)),
        ((Table::Badge, 1), row(Some(1), None)),
        ((Table::Node, 1), row(None, Some(1))),
        ((Table::Node, 2), row(Some(1), None)),
        ((Table::Node, 3), row(Some(2), None)),
        ((Table::Link, 1), row(Some(3), None)),
        ((Table::Link, 2), row(Some(1), None)),
        ((Table::Link, 3), row(Some(2), None)),
        ((Table::Counter, 1), row(None, None)),
        ((Table::Counter, 2), row(None, None)),
    ];
    Rows(rows.into_iter().collect())
}
