//! What a statement may do and may leave behind, by its type.
//!
//! A type's name tells which parts of Diesel a query is made of, and which are not Diesel's. It is read once a thread and then
//! found by its address; so is, where only the text tells, what it told.

use std::any::type_name;
use std::cell::Cell;

use diesel::query_builder::AsQuery;

use super::transaction_state::Access;
use crate::kind::DatabaseKind;
use crate::unit_of_work::{Newest, StatementKind};

/// What is known of a statement before it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Statement {
    pub(crate) access: Access,
    pub(crate) traces: Traces,
    /// Whether the rows that it gives may be newer than those that are known. A query with a locking clause cannot be boxed, and a boxed
    /// one gets none.
    pub(super) newest: Newest,
    /// Whether rows that it does not give may be newer afterwards than those that are known: it writes, it calls a function of the
    /// program's own that may do so or wait for a lock, or it locks rows of several tables.
    pub(super) outdates: bool,
    /// A bit for each kind of database for which the text of a `Selected` has told that it leaves nothing.
    cleared: u8,
    name: &'static str,
}

/// What a statement may leave on the connection that outlives its transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Traces {
    /// Nothing: it is made of Diesel's own parts, of columns and of values.
    None,
    /// Its type does not tell, its text does, which is the same each time: columns or expressions of a struct.
    Selected,
    /// Its type does not tell, its text does.
    Unknown,
    /// Something: there is SQL of the program's own in it.
    Some,
}

impl Statement {
    /// Whatever code the connection is guarded to sends.
    pub(crate) const RAW: Self = Self {
        access: Access::Raw,
        traces: Traces::Some,
        newest: Newest::Perhaps,
        outdates: true,
        cleared: 0,
        name: "",
    };

    /// Whether it is code that has the connection, which may do more than send one statement.
    #[inline]
    pub(crate) fn is_code(&self) -> bool {
        self.name.is_empty() && self.access == Access::Raw
    }

    /// Whether the connection is afterwards as it was.
    #[inline]
    pub(crate) fn leaves_nothing(&self, kind: impl FnOnce() -> DatabaseKind) -> bool {
        self.traces == Traces::None || self.traces < Traces::Some && self.was_cleared(kind())
    }

    /// Its text, which is the same each time, has told that it leaves nothing on this kind of database.
    pub(crate) fn clear(mut self, kind: DatabaseKind) {
        if self.traces == Traces::Selected {
            self.cleared |= bit(kind);
            // A thread that ends remembers nothing.
            let _ = MEMORY.try_with(|memory| memory[place(self.name)].set(self));
        }
    }

    /// On SQLite there is nothing that a function could leave.
    fn was_cleared(&self, kind: DatabaseKind) -> bool {
        kind == DatabaseKind::Sqlite || self.cleared & bit(kind) != 0
    }

    /// What a flush or a look-up by key sends.
    pub(super) fn of_entity(what: StatementKind) -> Self {
        match what {
            StatementKind::Select(name) => columns_of(name, Access::Read),
            StatementKind::Insert(name) => columns_of(name, Access::Write),
            StatementKind::Change => Self {
                access: Access::Write,
                traces: Traces::None,
                newest: Newest::No,
                outdates: true,
                cleared: 0,
                name: "",
            },
        }
    }

    /// A query: a typed SELECT only reads, raw SQL may do anything.
    #[inline]
    pub(super) fn of_query<Q: AsQuery>(_: &Q) -> Self {
        known(type_name::<Q::Query>())
    }

    /// A statement that is no SELECT.
    #[inline]
    pub(super) fn of_command<Q>() -> Self {
        let known = known(type_name::<Q>());
        let access = if known.access == Access::Raw { Access::Raw } else { Access::Write };
        Self { access, outdates: true, ..known }
    }
}

/// As many types as a thread remembers; a power of two.
const REMEMBERED: usize = 128;

thread_local! {
    static MEMORY: [Cell<Statement>; REMEMBERED] = const { [const { Cell::new(Statement::RAW) }; REMEMBERED] };
}

fn place(name: &str) -> usize {
    let address = name.as_ptr() as usize;
    (address ^ (address >> 7)).wrapping_add(name.len()) % REMEMBERED
}

#[inline]
fn known(name: &'static str) -> Statement {
    let look_up = |memory: &[Cell<Statement>; REMEMBERED]| {
        let place = &memory[place(name)];
        let remembered = place.get();
        // Names are not moved while the program runs, but one may begin where another does.
        if remembered.name.as_ptr() == name.as_ptr() && remembered.name.len() == name.len() {
            return remembered;
        }
        let statement = read(name);
        place.set(statement);
        statement
    };
    MEMORY.try_with(look_up).unwrap_or_else(|_| read(name))
}

/// The columns of an entity, or whatever expressions it has been given for them.
fn columns_of(name: &'static str, access: Access) -> Statement {
    let statement = Statement {
        access,
        traces: Traces::Selected,
        newest: Newest::No,
        outdates: access != Access::Read,
        cleared: 0,
        name,
    };
    let known = MEMORY.try_with(|memory| memory[place(name)].get());
    known.ok().filter(|known| std::ptr::eq(known.name, name) && known.traces == Traces::Selected).unwrap_or(statement)
}

fn bit(kind: DatabaseKind) -> u8 {
    1 << kind as u8
}

#[cold]
fn read(name: &'static str) -> Statement {
    let typed = name.starts_with("diesel::query_builder::") && !name.starts_with("diesel::query_builder::sql_query::");
    let access = match typed {
        true if name.starts_with("diesel::query_builder::select_statement::") => Access::Read,
        true => Access::Write,
        false => Access::Raw,
    };
    let newest = match typed {
        true if name.contains(LOCKING) || GIVE_WHAT_THEY_WROTE.iter().any(|start| name.starts_with(start)) => {
            Newest::Locked
        }
        true if !name.contains(LITERAL) => Newest::No,
        _ => Newest::Perhaps,
    };
    let traces = if typed { traces(name) } else { Traces::Some };
    let outdates = access != Access::Read
        || traces == Traces::Some && name.starts_with(WITHOUT_TABLE)
        || newest == Newest::Locked && name.contains("::joins::");
    Statement { access, traces, newest, outdates, cleared: 0, name }
}

/// `FOR UPDATE` and its like, of the query or of one in it. A name has no parameters that are those of the type's definition.
const LOCKING: &str = "::locking_clause::LockingClause";

/// A SELECT of expressions alone. One that calls a function of the program's own does so for what the function does.
const WITHOUT_TABLE: &str =
    "diesel::query_builder::select_statement::SelectStatement<diesel::query_builder::from_clause::NoFromClause";

/// SQL of the program's own, which may end in a locking clause.
const LITERAL: &str = "::sql_literal::";

/// Statements whose `RETURNING` gives the rows as they are afterwards.
const GIVE_WHAT_THEY_WROTE: [&str; 2] =
    ["diesel::query_builder::insert_statement::", "diesel::query_builder::update_statement::"];

/// The path of a type is one word here, `{` of closures included.
fn is_path(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | ':' | '{' | '}' | '#')
}

/// Functions and operators that a program defines are types of its own, as are its tables and columns, which have names that
/// tell. Everything else that is not Diesel's counts as SQL, except inside of types that hold no SQL.
fn traces(name: &str) -> Traces {
    let mut worst = Traces::None;
    let mut rest = name;
    while let Some(start) = rest.find(is_path) {
        rest = &rest[start..];
        let path;
        (path, rest) = rest.split_at(rest.find(|c| !is_path(c)).unwrap_or(rest.len()));
        if HOLD_NO_SQL.contains(&path) {
            rest = after_arguments(rest);
        } else if path == SELECTABLE {
            // The columns of a struct, or whatever expression it has been given for one.
            worst = worst.max(Traces::Selected);
            rest = after_arguments(rest);
        } else {
            worst = worst.max(traces_of(path, name));
        }
    }
    worst
}

/// Values and their types, and names of aliases.
const HOLD_NO_SQL: [&str; 4] = [
    "diesel::expression::array_comparison::Many",
    "diesel::expression::bound::Bound",
    "diesel::query_source::aliasing::alias::Alias",
    "diesel::query_source::aliasing::aliased_field::AliasedField",
];

const SELECTABLE: &str = "diesel::expression::select_by::SelectBy";

/// What a type may leave that is part of the statement `name`.
fn traces_of(path: &str, name: &str) -> Traces {
    match path.split_once("::") {
        Some(("diesel", _)) if path.contains("::sql_literal::") || path.contains("::sql_query::") => Traces::Some,
        Some(("diesel", _)) if path.contains("Boxed") => Traces::Unknown,
        None if path == "dyn" => Traces::Unknown,
        Some(("diesel" | "core" | "alloc" | "std", _)) | None => Traces::None,
        Some(_) if path.ends_with("::table") => Traces::None,
        Some(_) if is_column(path, name) => Traces::None,
        Some(_) => Traces::Some,
    }
}

/// Whether a type is a column of a table that the statement names too. The module alone proves nothing: a program may keep its own
/// expressions in a module named `columns`.
fn is_column(path: &str, name: &str) -> bool {
    let table = path.rsplit_once("::").and_then(|(module, _)| module.strip_suffix("columns"));
    table.is_some_and(|table| {
        let table = format!("{table}table");
        name.match_indices(&*table)
            .any(|(at, _)| !name[..at].ends_with(is_path) && !name[at + table.len()..].starts_with(is_path))
    })
}

/// What follows the `<..>` that `text` starts with.
fn after_arguments(text: &str) -> &str {
    if !text.starts_with('<') {
        return text;
    }
    let mut depth = 0_usize;
    let mut before = ' ';
    for (at, c) in text.char_indices() {
        match c {
            '<' => depth += 1,
            // Not of the arrow in the type of a function.
            '>' if before != '-' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return &text[at + c.len_utf8()..];
        }
        before = c;
    }
    ""
}

#[cfg(all(test, feature = "sqlite"))]
mod tests {
    // Of the macros' makings not everything is used.
    #![allow(unreachable_pub, dead_code)]

    use diesel::dsl::{count_star, exists, not, now, sql};
    use diesel::prelude::*;
    use diesel::sql_types::{Bool, Integer, Text};
    use diesel::sqlite::Sqlite;

    use super::*;

    diesel::table! {
        users (id) { id -> Integer, name -> Text, age -> Nullable<Integer>, }
    }
    diesel::table! {
        posts (id) { id -> Integer, user_id -> Integer, title -> Text, }
    }
    diesel::joinable!(posts -> users (user_id));
    diesel::allow_tables_to_appear_in_same_query!(posts, users);

    #[derive(Queryable, Selectable, Insertable, AsChangeset, Identifiable)]
    #[diesel(table_name = users)]
    struct User {
        id: i32,
        name: String,
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, diesel::expression::AsExpression)]
    #[diesel(sql_type = Integer)]
    struct UserId(i32);

    impl diesel::serialize::ToSql<Integer, Sqlite> for UserId {
        fn to_sql<'b>(&'b self, out: &mut diesel::serialize::Output<'b, '_, Sqlite>) -> diesel::serialize::Result {
            out.set_value(self.0);
            Ok(diesel::serialize::IsNull::No)
        }
    }

    #[diesel::declare_sql_function]
    extern "SQL" {
        fn declared(number: Integer) -> Integer;
        fn without_arguments() -> Integer;
    }
    diesel::define_sql_function!(fn defined(number: Integer) -> Integer);
    diesel::infix_operator!(Matches, " @@ ", backend: Sqlite);

    /// A program's own expressions, in a module that is named as that of a table's columns.
    mod columns {
        use diesel::sql_types::{Integer, Text};

        diesel::define_sql_function!(fn defined(number: Integer) -> Integer);
        diesel::infix_operator!(Matches, " @@ ", backend: diesel::sqlite::Sqlite);
        #[diesel::declare_sql_function]
        extern "SQL" {
            fn declared(text: Text) -> Integer;
        }
    }

    #[track_caller]
    fn query<Q: AsQuery>(query: Q, access: Access, traces: Traces) {
        for _ in 0..2 {
            let known = Statement::of_query(&query);
            assert_eq!((known.access, known.traces), (access, traces), "{}", type_name::<Q::Query>());
        }
    }

    #[track_caller]
    fn command<Q>(_: Q, access: Access, traces: Traces) {
        let known = Statement::of_command::<Q>();
        assert_eq!((known.access, known.traces), (access, traces), "{}", type_name::<Q>());
    }

    #[test]
    fn typed_statements_leave_nothing() {
        let read = Access::Read;
        query(users::table, read, Traces::None);
        query(users::table.find(1).select((users::id, users::name)).limit(3), read, Traces::None);
        query(users::table.filter(users::id.eq_any([1, 2])).order(users::name.desc()), read, Traces::None);
        query(users::table.filter(users::id.eq(UserId(7))), read, Traces::None);
        query(users::table.filter(users::id.eq_any(vec![UserId(7), UserId(8)])), read, Traces::None);
        query(users::table.filter(users::age.is_null().and(not(users::name.like("A%")))), read, Traces::None);
        query(posts::table.inner_join(users::table).select((posts::title, users::name)), read, Traces::None);
        query(posts::table.left_join(users::table).select(users::name.nullable()), read, Traces::None);
        query(diesel::select(exists(users::table.filter(users::id.eq(1)))), read, Traces::None);
        query(users::table.select(count_star()), read, Traces::None);
        query(
            users::table.group_by(users::name).select((users::name, diesel::dsl::max(users::age))),
            read,
            Traces::None,
        );
        query(diesel::select(now), read, Traces::None);
        let other = diesel::alias!(users as other);
        query(other.filter(other.field(users::id).eq(1)).select(other.field(users::name)), read, Traces::None);
        let write = Access::Write;
        let user = User { id: 1, name: "Ada".into() };
        command(diesel::insert_into(users::table).values(&user), write, Traces::None);
        command(diesel::insert_into(users::table).values(vec![users::name.eq("Ada")]), write, Traces::None);
        command(
            diesel::insert_into(users::table).values((users::id.eq(UserId(1)), users::name.eq("a"))),
            write,
            Traces::None,
        );
        command(diesel::update(users::table.find(1)).set(&user), write, Traces::None);
        command(diesel::update(&user).set(users::age.eq(users::age + 1)), write, Traces::None);
        command(diesel::delete(users::table.filter(users::id.gt(1))), write, Traces::None);
        query(diesel::insert_into(users::table).values(&user).returning(users::id), write, Traces::None);
        command(diesel::insert_or_ignore_into(users::table).values(&user), write, Traces::None);
        command(
            diesel::insert_into(users::table)
                .values(&user)
                .on_conflict(users::id)
                .do_update()
                .set(users::name.eq("Bob")),
            write,
            Traces::None,
        );
    }

    #[test]
    fn newest_rows_come_from_locking_reads_and_writes_and_perhaps_from_sql_of_the_programs_own() {
        fn newest<Q: AsQuery>(query: &Q) -> Newest {
            Statement::of_query(query).newest
        }
        assert_eq!(newest(&users::table), Newest::No);
        assert_eq!(newest(&users::table.find(1).into_boxed::<Sqlite>()), Newest::No);
        assert_eq!(newest(&users::table.select(defined(users::id))), Newest::No);
        assert_eq!(newest(&users::table.union(users::table)), Newest::No);
        assert_eq!(newest(&users::table.for_update()), Newest::Locked);
        assert_eq!(newest(&users::table.find(1).select(users::name).for_share().skip_locked()), Newest::Locked);
        assert_eq!(newest(&posts::table.inner_join(users::table).for_no_key_update().no_wait()), Newest::Locked);
        assert_eq!(newest(&users::table.for_key_share()), Newest::Locked);
        let user = User { id: 1, name: "Ada".into() };
        assert_eq!(newest(&diesel::insert_into(users::table).values(&user).returning(users::id)), Newest::Locked);
        assert_eq!(newest(&diesel::update(&user).set(users::name.eq("Bob")).returning(users::id)), Newest::Locked);
        assert_eq!(newest(&diesel::delete(users::table).returning(users::id)), Newest::No);
        assert_eq!(newest(&users::table.filter(sql::<Bool>("1 = 1"))), Newest::Perhaps);
        assert_eq!(newest(&diesel::sql_query("SELECT 1")), Newest::Perhaps);
    }

    #[test]
    fn statements_that_may_change_rows_or_lock_others_outdate_what_is_known() {
        fn outdates<Q: AsQuery>(query: &Q) -> bool {
            Statement::of_query(query).outdates
        }
        assert!(!outdates(&users::table.find(1)) && !outdates(&users::table.select(defined(users::id))));
        assert!(!outdates(&users::table.for_update()) && !outdates(&diesel::select(exists(users::table.find(1)))));
        assert!(outdates(&posts::table.inner_join(users::table).select(users::id).for_update()));
        assert!(outdates(&diesel::select(defined(1))) && outdates(&diesel::sql_query("SELECT 1")));
        assert!(outdates(&diesel::insert_into(users::table).default_values().returning(users::id)));
    }

    #[test]
    fn sql_of_the_programs_own_may_leave_something() {
        let read = Access::Read;
        query(diesel::select(sql::<Integer>("1")), read, Traces::Some);
        query(users::table.filter(sql::<Bool>("1 = ").bind::<Integer, _>(1)), read, Traces::Some);
        query(users::table.select(declared(users::id)), read, Traces::Some);
        query(diesel::select(defined(1)), read, Traces::Some);
        query(diesel::select(without_arguments()), read, Traces::Some);
        query(users::table.filter(users::id.eq(defined(users::id))), read, Traces::Some);
        query(users::table.filter(Matches::new(users::name, users::name)).select(users::id), read, Traces::Some);
        query(users::table.order(defined(users::id)), read, Traces::Some);
        query(users::table.select(columns::defined(users::id)), read, Traces::Some);
        query(users::table.select(columns::declared(users::name)), read, Traces::Some);
        query(users::table.filter(columns::Matches::new(users::name, users::name)), read, Traces::Some);
        command(diesel::update(users::table).set(users::id.eq(defined(users::id))), Access::Write, Traces::Some);
        command(
            diesel::insert_into(users::table).values(users::id.eq(sql::<Integer>("1"))),
            Access::Write,
            Traces::Some,
        );
        command(diesel::delete(users::table.filter(users::id.eq(defined(1)))), Access::Write, Traces::Some);
        query(diesel::sql_query("SELECT 1"), Access::Raw, Traces::Some);
        command(diesel::sql_query("SELECT 1").bind::<Text, _>("a"), Access::Raw, Traces::Some);
    }

    #[test]
    fn where_the_type_does_not_tell_the_text_is_read() {
        let read = Access::Read;
        query(users::table.into_boxed::<Sqlite>(), read, Traces::Unknown);
        query(users::table.select(<User as SelectableHelper<Sqlite>>::as_select()), read, Traces::Selected);
        let condition: Box<dyn BoxableExpression<users::table, Sqlite, SqlType = Bool>> = Box::new(users::id.eq(1));
        query(users::table.filter(condition), read, Traces::Unknown);
        query(
            users::table.select(<User as SelectableHelper<Sqlite>>::as_select()).filter(users::id.eq(defined(1))),
            read,
            Traces::Some,
        );
        command(diesel::delete(users::table).into_boxed::<Sqlite>(), Access::Write, Traces::Unknown);
        command(
            diesel::update(users::table).set(users::id.eq(1)).into_boxed::<Sqlite>(),
            Access::Write,
            Traces::Unknown,
        );
    }

    #[test]
    fn what_the_text_has_told_once_is_remembered_for_that_kind() {
        let query = users::table.select(<User as SelectableHelper<Sqlite>>::as_select());
        let leaves_nothing = |kind| Statement::of_query(&query).leaves_nothing(|| kind);
        assert!(
            !leaves_nothing(DatabaseKind::Postgres)
                && !leaves_nothing(DatabaseKind::Mysql)
                && leaves_nothing(DatabaseKind::Sqlite)
        );
        Statement::of_query(&query).clear(DatabaseKind::Postgres);
        assert!(leaves_nothing(DatabaseKind::Postgres) && !leaves_nothing(DatabaseKind::Mysql));
        let boxed = users::table.into_boxed::<Sqlite>();
        Statement::of_query(&boxed).clear(DatabaseKind::Postgres);
        assert!(!Statement::of_query(&boxed).leaves_nothing(|| DatabaseKind::Postgres));
    }
}
