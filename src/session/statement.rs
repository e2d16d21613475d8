//! What a statement may do and may leave on its connection, judged by its type.
//!
//! The name of a statement's type tells which parts of the statement are Diesel's and which are the program's. Each
//! thread reads a name once and then finds the result by the name's address. If only the text shows it, the thread
//! remembers the result of reading the text in the same way.

use std::any::type_name;
use std::cell::Cell;

use super::transaction_state::Access;
use crate::kind::DatabaseKind;
use crate::unit_of_work::{Newest, StatementKind};

/// What the session knows about a statement before the statement is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Statement {
    pub(crate) access: Access,
    pub(crate) leftovers: Leftovers,
    /// Whether the returned rows may be newer than the tracked values. Diesel cannot box a query with a locking
    /// clause, and a boxed query cannot get one.
    pub(super) newest: Newest,
    /// Whether tracked rows that the statement does not return may be outdated afterwards: the statement writes, or
    /// it calls a function of the program that may write or wait for a lock, or it locks rows of several tables.
    pub(super) expires_rows: bool,
    /// Whether it is a typed INSERT, UPDATE or DELETE. The observer sees whether raw SQL writes.
    pub(super) writes: bool,
    /// One bit for each kind of database on which the text of the statement was found to leave nothing.
    clean_on: u8,
    /// One bit for each kind of database on which the text of the statement was found to only read.
    reads_on: u8,
    /// One bit for each kind of database on which the text of the statement may do more than read.
    acts_on: u8,
    name: &'static str,
}

/// What a statement may leave on the connection beyond its transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Leftovers {
    /// Nothing: the statement consists of Diesel's own parts, columns and values.
    None,
    /// Only the text shows it. The text is always the same: columns or expressions of a struct.
    Selected,
    /// Only the text shows it. The text may differ each time.
    Unknown,
    /// Something: the statement contains SQL of the program.
    Possible,
}

impl Statement {
    /// Whatever code sends that has the connection itself.
    pub(crate) const RAW: Self = Self {
        access: Access::Raw,
        leftovers: Leftovers::Possible,
        newest: Newest::Perhaps,
        expires_rows: true,
        writes: false,
        clean_on: 0,
        reads_on: 0,
        acts_on: 0,
        name: "",
    };

    /// Whether it is code that has the connection, which may do more than send one statement.
    #[inline]
    pub(crate) fn is_code(&self) -> bool {
        self.name.is_empty() && self.access == Access::Raw
    }

    /// Whether the statement leaves nothing on the connection.
    #[inline]
    pub(crate) fn leaves_nothing(&self, kind: impl FnOnce() -> DatabaseKind) -> bool {
        // On SQLite a function has nothing to leave.
        let is_clean_on = |kind| kind == DatabaseKind::Sqlite || self.clean_on & kind_bit(kind) != 0;
        self.leftovers == Leftovers::None || self.leftovers < Leftovers::Possible && is_clean_on(kind())
    }

    /// Remembers that the text of the statement leaves nothing on this kind of database.
    pub(crate) fn remember_clean(mut self, kind: DatabaseKind) {
        self.clean_on |= kind_bit(kind);
        self.remember();
    }

    /// Remembers the statement, if its text is always the same.
    fn remember(self) {
        if self.leftovers == Leftovers::Selected {
            // The cache is gone if the thread is ending.
            let _ = CACHE.try_with(|cache| cache[cache_index(self.name)].set(self));
        }
    }

    /// Whether the statement only reads: it is a SELECT that takes no lock and calls no function of the program. `None`
    /// means that only the text shows it.
    #[inline]
    pub(crate) fn only_reads(&self, kind: DatabaseKind) -> Option<bool> {
        if self.access != Access::Read || self.newest == Newest::Locked {
            return Some(false);
        }
        match self.leftovers {
            Leftovers::None => Some(true),
            // On SQLite a function cannot write.
            _ if kind == DatabaseKind::Sqlite || self.reads_on & kind_bit(kind) != 0 => Some(true),
            Leftovers::Possible => Some(false),
            _ => (self.acts_on & kind_bit(kind) != 0).then_some(false),
        }
    }

    /// The statement after its text was read. An unknown text may do anything.
    pub(super) fn with_text(mut self, kind: DatabaseKind, sql: Option<&str>) -> Self {
        match sql.is_some_and(|sql| kind.only_reads(sql)) {
            true => self.reads_on |= kind_bit(kind),
            false => self.acts_on |= kind_bit(kind),
        }
        self.remember();
        self
    }

    /// A statement that a flush or a look-up by key sends.
    pub(super) fn of_entity(what: StatementKind) -> Self {
        match what {
            StatementKind::Select(name) => columns_of(name, Access::Read),
            StatementKind::Insert(name) => columns_of(name, Access::Write),
            StatementKind::Change => {
                let (access, leftovers, newest) = (Access::Write, Leftovers::None, Newest::No);
                Self { access, leftovers, newest, writes: true, ..Self::RAW }
            }
        }
    }

    /// A query: a typed SELECT only reads, raw SQL may do anything.
    #[inline]
    pub(super) fn of_query<Q>() -> Self {
        classify_cached(type_name::<Q>())
    }

    /// A statement other than a SELECT.
    #[inline]
    pub(super) fn of_command<Q>() -> Self {
        let known = classify_cached(type_name::<Q>());
        let access = if known.access == Access::Raw { Access::Raw } else { Access::Write };
        Self { access, expires_rows: true, ..known }
    }
}

/// The number of types that a thread remembers; a power of two.
const CACHE_SIZE: usize = 128;

thread_local! {
    static CACHE: [Cell<Statement>; CACHE_SIZE] = const { [const { Cell::new(Statement::RAW) }; CACHE_SIZE] };
}

fn cache_index(name: &str) -> usize {
    let address = name.as_ptr() as usize;
    (address ^ (address >> 7)).wrapping_add(name.len()) % CACHE_SIZE
}

#[inline]
fn classify_cached(name: &'static str) -> Statement {
    let look_up = |cache: &[Cell<Statement>; CACHE_SIZE]| {
        let slot = &cache[cache_index(name)];
        let remembered = slot.get();
        // A name does not move while the program runs, but two names may begin at the same address.
        if remembered.name.as_ptr() == name.as_ptr() && remembered.name.len() == name.len() {
            return remembered;
        }
        let statement = classify(name);
        slot.set(statement);
        statement
    };
    CACHE.try_with(look_up).unwrap_or_else(|_| classify(name))
}

/// A statement that returns the columns of an entity, or the expressions that the entity has in their place.
fn columns_of(name: &'static str, access: Access) -> Statement {
    let statement = Statement {
        access,
        leftovers: Leftovers::Selected,
        newest: Newest::No,
        expires_rows: access != Access::Read,
        writes: access == Access::Write,
        // The derive of an entity accepts columns only.
        reads_on: if access == Access::Read { u8::MAX } else { 0 },
        name,
        ..Statement::RAW
    };
    let known = CACHE.try_with(|cache| cache[cache_index(name)].get());
    known
        .ok()
        .filter(|known| std::ptr::eq(known.name, name) && known.leftovers == Leftovers::Selected)
        .unwrap_or(statement)
}

fn kind_bit(kind: DatabaseKind) -> u8 {
    1 << kind as u8
}

#[cold]
fn classify(name: &'static str) -> Statement {
    let typed = name.starts_with("diesel::query_builder::") && !name.starts_with("diesel::query_builder::sql_query::");
    let access = match typed {
        true if SELECTS.iter().any(|start| name.starts_with(start)) => Access::Read,
        true => Access::Write,
        false => Access::Raw,
    };
    let newest = match typed {
        true if name.contains(LOCKING) || RETURN_WRITTEN_ROWS.iter().any(|start| name.starts_with(start)) => {
            Newest::Locked
        }
        true if !name.contains(LITERAL) => Newest::No,
        _ => Newest::Perhaps,
    };
    let leftovers = if typed { leftovers_in(name) } else { Leftovers::Possible };
    let expires_rows = access != Access::Read
        || leftovers == Leftovers::Possible && name.starts_with(WITHOUT_TABLE)
        || newest == Newest::Locked && name.contains("::joins::");
    let writes = WRITES.iter().any(|start| name.starts_with(start));
    Statement { access, leftovers, newest, expires_rows, writes, name, ..Statement::RAW }
}

/// A SELECT, and a UNION or a similar combination of SELECTs.
const SELECTS: [&str; 2] = ["diesel::query_builder::select_statement::", "diesel::query_builder::combination_clause::"];

/// `FOR UPDATE` and similar clauses, of the query or of a subquery. The name of a type omits parameters that equal
/// the defaults of the type's definition.
const LOCKING: &str = "::locking_clause::LockingClause";

/// A SELECT without a table. If it calls a function of the program, it does so for the effects of the function.
const WITHOUT_TABLE: &str =
    "diesel::query_builder::select_statement::SelectStatement<diesel::query_builder::from_clause::NoFromClause";

/// SQL of the program, which may end in a locking clause.
const LITERAL: &str = "::sql_literal::";

/// Statements whose `RETURNING` returns the rows as the statement leaves them.
const RETURN_WRITTEN_ROWS: [&str; 2] =
    ["diesel::query_builder::insert_statement::", "diesel::query_builder::update_statement::"];

/// The statements that write.
const WRITES: [&str; 3] = [
    "diesel::query_builder::insert_statement::",
    "diesel::query_builder::update_statement::",
    "diesel::query_builder::delete_statement::",
];

/// Whether `c` belongs to the path of a type, `{` of closures included.
fn is_path_char(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | ':' | '{' | '}' | '#')
}

/// Reads the name of a statement's type. The functions and operators, tables and columns of a program are types of
/// the program. The names of tables and columns show what they are. Every other type that is not Diesel's counts as
/// SQL, unless it is inside a type that holds no SQL.
fn leftovers_in(name: &str) -> Leftovers {
    let mut worst = Leftovers::None;
    let mut rest = name;
    while let Some(start) = rest.find(is_path_char) {
        rest = &rest[start..];
        let path;
        (path, rest) = rest.split_at(rest.find(|c| !is_path_char(c)).unwrap_or(rest.len()));
        if HOLD_NO_SQL.contains(&path) {
            rest = after_arguments(rest);
        } else if path == SELECTABLE {
            // The columns of a struct, or the expressions that the struct has in their place.
            worst = worst.max(Leftovers::Selected);
            rest = after_arguments(rest);
        } else {
            worst = worst.max(leftovers_of(path, name));
        }
    }
    worst
}

/// Types that hold no SQL: values with their types, and names of aliases.
const HOLD_NO_SQL: [&str; 4] = [
    "diesel::expression::array_comparison::Many",
    "diesel::expression::bound::Bound",
    "diesel::query_source::aliasing::alias::Alias",
    "diesel::query_source::aliasing::aliased_field::AliasedField",
];

const SELECTABLE: &str = "diesel::expression::select_by::SelectBy";

/// What a type may leave that is a part of the statement `name`.
fn leftovers_of(path: &str, name: &str) -> Leftovers {
    match path.split_once("::") {
        Some(("diesel", _)) if path.contains("::sql_literal::") || path.contains("::sql_query::") => {
            Leftovers::Possible
        }
        Some(("diesel", _)) if path.contains("Boxed") => Leftovers::Unknown,
        None if path == "dyn" => Leftovers::Unknown,
        Some(("diesel" | "core" | "alloc" | "std", _)) | None => Leftovers::None,
        Some(_) if path.ends_with("::table") => Leftovers::None,
        Some(_) if is_column(path, name) => Leftovers::None,
        Some(_) => Leftovers::Possible,
    }
}

/// Whether a type is a column of a table that the statement names too. The name of the module is no proof: a program
/// may keep its own expressions in a module named `columns`.
fn is_column(path: &str, name: &str) -> bool {
    let table = path.rsplit_once("::").and_then(|(module, _)| module.strip_suffix("columns"));
    table.is_some_and(|table| {
        let table = format!("{table}table");
        name.match_indices(&*table)
            .any(|(at, _)| !name[..at].ends_with(is_path_char) && !name[at + table.len()..].starts_with(is_path_char))
    })
}

/// The rest of `text` after the `<..>` at its start.
fn after_arguments(text: &str) -> &str {
    if !text.starts_with('<') {
        return text;
    }
    let mut depth = 0;
    let end = text.char_indices().find_map(|(at, c)| {
        match c {
            '<' => depth += 1,
            // The arrow in the type of a function closes nothing.
            '>' if !text[..at].ends_with('-') => depth -= 1,
            _ => {}
        }
        (depth == 0).then_some(at + 1)
    });
    &text[end.unwrap_or(text.len())..]
}

#[cfg(all(test, feature = "sqlite"))]
mod tests {
    // The macros define more than the tests use.
    #![allow(unreachable_pub, dead_code)]

    use diesel::dsl::{count_star, exists, not, now, sql};
    use diesel::prelude::*;
    use diesel::query_builder::AsQuery;
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

    /// Expressions of the program in a module that is named like the module of a table's columns.
    mod columns {
        use diesel::sql_types::{Integer, Text};

        diesel::define_sql_function!(fn defined(number: Integer) -> Integer);
        diesel::infix_operator!(Matches, " @@ ", backend: diesel::sqlite::Sqlite);
        #[diesel::declare_sql_function]
        extern "SQL" {
            fn declared(text: Text) -> Integer;
        }
    }

    fn of<Q: AsQuery>(_: &Q) -> Statement {
        Statement::of_query::<Q::Query>()
    }

    #[track_caller]
    fn query<Q: AsQuery>(query: Q, access: Access, leftovers: Leftovers) {
        for _ in 0..2 {
            let known = of(&query);
            assert_eq!((known.access, known.leftovers), (access, leftovers), "{}", type_name::<Q::Query>());
        }
    }

    #[track_caller]
    fn command<Q>(_: Q, access: Access, leftovers: Leftovers) {
        let known = Statement::of_command::<Q>();
        assert_eq!((known.access, known.leftovers), (access, leftovers), "{}", type_name::<Q>());
    }

    #[test]
    fn typed_statement_leaves_nothing() {
        let read = Access::Read;
        query(users::table, read, Leftovers::None);
        query(users::table.find(1).select((users::id, users::name)).limit(3), read, Leftovers::None);
        query(users::table.filter(users::id.eq_any([1, 2])).order(users::name.desc()), read, Leftovers::None);
        query(users::table.filter(users::id.eq(UserId(7))), read, Leftovers::None);
        query(users::table.filter(users::id.eq_any(vec![UserId(7), UserId(8)])), read, Leftovers::None);
        query(users::table.filter(users::age.is_null().and(not(users::name.like("A%")))), read, Leftovers::None);
        query(posts::table.inner_join(users::table).select((posts::title, users::name)), read, Leftovers::None);
        query(posts::table.left_join(users::table).select(users::name.nullable()), read, Leftovers::None);
        query(diesel::select(exists(users::table.filter(users::id.eq(1)))), read, Leftovers::None);
        query(users::table.select(count_star()), read, Leftovers::None);
        query(
            users::table.group_by(users::name).select((users::name, diesel::dsl::max(users::age))),
            read,
            Leftovers::None,
        );
        query(diesel::select(now), read, Leftovers::None);
        let other = diesel::alias!(users as other);
        query(other.filter(other.field(users::id).eq(1)).select(other.field(users::name)), read, Leftovers::None);
        let write = Access::Write;
        let user = User { id: 1, name: "Ada".into() };
        command(diesel::insert_into(users::table).values(&user), write, Leftovers::None);
        command(diesel::insert_into(users::table).values(vec![users::name.eq("Ada")]), write, Leftovers::None);
        command(
            diesel::insert_into(users::table).values((users::id.eq(UserId(1)), users::name.eq("a"))),
            write,
            Leftovers::None,
        );
        command(diesel::update(users::table.find(1)).set(&user), write, Leftovers::None);
        command(diesel::update(&user).set(users::age.eq(users::age + 1)), write, Leftovers::None);
        command(diesel::delete(users::table.filter(users::id.gt(1))), write, Leftovers::None);
        query(diesel::insert_into(users::table).values(&user).returning(users::id), write, Leftovers::None);
        command(diesel::insert_or_ignore_into(users::table).values(&user), write, Leftovers::None);
        command(
            diesel::insert_into(users::table)
                .values(&user)
                .on_conflict(users::id)
                .do_update()
                .set(users::name.eq("Bob")),
            write,
            Leftovers::None,
        );
    }

    #[test]
    fn statement_returns_newest_rows_if_it_locks_or_writes() {
        fn newest<Q: AsQuery>(query: &Q) -> Newest {
            of(query).newest
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
    fn statement_writes_if_it_is_an_insert_update_or_delete() {
        fn writes<Q: AsQuery>(query: &Q) -> bool {
            of(query).writes
        }
        fn command_writes<Q>(_: Q) -> bool {
            Statement::of_command::<Q>().writes
        }
        assert!(!writes(&users::table) && !writes(&users::table.find(1).for_update()));
        assert!(!writes(&users::table.union(users::table)) && !writes(&users::table.into_boxed::<Sqlite>()));
        assert!(!writes(&diesel::select(defined(1))) && !writes(&diesel::sql_query("DELETE FROM users")));
        let user = User { id: 1, name: "Ada".into() };
        assert!(writes(&diesel::insert_into(users::table).values(&user).returning(users::id)));
        assert!(command_writes(diesel::insert_into(users::table).values(vec![users::id.eq(1)])));
        assert!(command_writes(diesel::insert_or_ignore_into(users::table).values(&user)));
        assert!(command_writes(diesel::replace_into(users::table).values(&user)));
        assert!(command_writes(diesel::update(&user).set(users::name.eq("Bob"))));
        assert!(command_writes(diesel::update(users::table).set(users::id.eq(1)).into_boxed::<Sqlite>()));
        assert!(command_writes(diesel::delete(users::table).into_boxed::<Sqlite>()));
        assert!(command_writes(users::table.find(1).insert_into(users::table)));
    }

    #[test]
    fn statement_expires_rows_if_it_may_change_or_lock_others() {
        fn expires_rows<Q: AsQuery>(query: &Q) -> bool {
            of(query).expires_rows
        }
        assert!(!expires_rows(&users::table.find(1)) && !expires_rows(&users::table.select(defined(users::id))));
        assert!(
            !expires_rows(&users::table.for_update()) && !expires_rows(&diesel::select(exists(users::table.find(1))))
        );
        assert!(expires_rows(&posts::table.inner_join(users::table).select(users::id).for_update()));
        assert!(expires_rows(&diesel::select(defined(1))) && expires_rows(&diesel::sql_query("SELECT 1")));
        assert!(expires_rows(&diesel::insert_into(users::table).default_values().returning(users::id)));
    }

    #[test]
    fn statement_with_sql_of_the_program_may_leave_something() {
        let read = Access::Read;
        query(diesel::select(sql::<Integer>("1")), read, Leftovers::Possible);
        query(users::table.filter(sql::<Bool>("1 = ").bind::<Integer, _>(1)), read, Leftovers::Possible);
        query(users::table.select(declared(users::id)), read, Leftovers::Possible);
        query(diesel::select(defined(1)), read, Leftovers::Possible);
        query(diesel::select(without_arguments()), read, Leftovers::Possible);
        query(users::table.filter(users::id.eq(defined(users::id))), read, Leftovers::Possible);
        query(users::table.filter(Matches::new(users::name, users::name)).select(users::id), read, Leftovers::Possible);
        query(users::table.order(defined(users::id)), read, Leftovers::Possible);
        query(users::table.select(columns::defined(users::id)), read, Leftovers::Possible);
        query(users::table.select(columns::declared(users::name)), read, Leftovers::Possible);
        query(users::table.filter(columns::Matches::new(users::name, users::name)), read, Leftovers::Possible);
        command(diesel::update(users::table).set(users::id.eq(defined(users::id))), Access::Write, Leftovers::Possible);
        command(
            diesel::insert_into(users::table).values(users::id.eq(sql::<Integer>("1"))),
            Access::Write,
            Leftovers::Possible,
        );
        command(diesel::delete(users::table.filter(users::id.eq(defined(1)))), Access::Write, Leftovers::Possible);
        query(diesel::sql_query("SELECT 1"), Access::Raw, Leftovers::Possible);
        command(diesel::sql_query("SELECT 1").bind::<Text, _>("a"), Access::Raw, Leftovers::Possible);
    }

    #[test]
    fn boxed_or_selected_statement_is_judged_by_its_text() {
        let read = Access::Read;
        query(users::table.into_boxed::<Sqlite>(), read, Leftovers::Unknown);
        query(users::table.select(<User as SelectableHelper<Sqlite>>::as_select()), read, Leftovers::Selected);
        let condition: Box<dyn BoxableExpression<users::table, Sqlite, SqlType = Bool>> = Box::new(users::id.eq(1));
        query(users::table.filter(condition), read, Leftovers::Unknown);
        query(
            users::table.select(<User as SelectableHelper<Sqlite>>::as_select()).filter(users::id.eq(defined(1))),
            read,
            Leftovers::Possible,
        );
        command(diesel::delete(users::table).into_boxed::<Sqlite>(), Access::Write, Leftovers::Unknown);
        command(
            diesel::update(users::table).set(users::id.eq(1)).into_boxed::<Sqlite>(),
            Access::Write,
            Leftovers::Unknown,
        );
    }

    #[test]
    fn clean_text_is_remembered_for_each_kind_of_database() {
        let query = users::table.select(<User as SelectableHelper<Sqlite>>::as_select());
        let leaves_nothing = |kind| of(&query).leaves_nothing(|| kind);
        assert!(
            !leaves_nothing(DatabaseKind::Postgres)
                && !leaves_nothing(DatabaseKind::Mysql)
                && leaves_nothing(DatabaseKind::Sqlite)
        );
        of(&query).remember_clean(DatabaseKind::Postgres);
        assert!(leaves_nothing(DatabaseKind::Postgres) && !leaves_nothing(DatabaseKind::Mysql));
        let boxed = users::table.into_boxed::<Sqlite>();
        of(&boxed).remember_clean(DatabaseKind::Postgres);
        assert!(!of(&boxed).leaves_nothing(|| DatabaseKind::Postgres));
    }

    #[test]
    fn only_a_read_without_side_effects_may_precede_the_transaction() {
        #[track_caller]
        fn check<Q: AsQuery>(query: &Q, wanted: Option<bool>) {
            let statement = of(query);
            assert_eq!(statement.only_reads(DatabaseKind::Postgres), wanted, "{}", type_name::<Q::Query>());
            let on_sqlite = if statement.access == Access::Read { Some(true) } else { Some(false) };
            assert_eq!(statement.only_reads(DatabaseKind::Sqlite), on_sqlite, "{}", type_name::<Q::Query>());
        }
        check(&users::table, Some(true));
        check(&users::table.inner_join(posts::table).filter(users::name.eq("a")).select(count_star()), Some(true));
        check(&users::table.select(users::id).union(posts::table.select(posts::id)), Some(true));
        check(&users::table.select(declared(users::id)), Some(false));
        check(&users::table.filter(sql::<Bool>("true")), Some(false));
        check(&users::table.into_boxed::<Sqlite>(), None);
        check(&users::table.select(<User as SelectableHelper<Sqlite>>::as_select()), None);
        check(&diesel::sql_query("SELECT 1"), Some(false));
        let command = Statement::of_command::<diesel::dsl::delete<users::table>>();
        assert_eq!(command.only_reads(DatabaseKind::Sqlite), Some(false));
    }

    #[test]
    fn text_of_a_boxed_query_is_read_each_time_and_that_of_a_selection_once() {
        let boxed = of(&users::table.into_boxed::<Sqlite>());
        let judged = |sql| boxed.with_text(DatabaseKind::Postgres, sql).only_reads(DatabaseKind::Postgres);
        assert_eq!(judged(Some("SELECT id FROM users")), Some(true));
        assert_eq!(judged(Some("SELECT mine(id) FROM users")), Some(false));
        assert_eq!(judged(None), Some(false), "nothing is known");
        let selected =
            || of(&posts::table.inner_join(users::table).select(<User as SelectableHelper<Sqlite>>::as_select()));
        let reads = |kind| selected().only_reads(kind);
        selected().with_text(DatabaseKind::Postgres, Some("SELECT id FROM users"));
        selected().with_text(DatabaseKind::Mysql, Some("SELECT mine(id) FROM users"));
        assert_eq!((reads(DatabaseKind::Postgres), reads(DatabaseKind::Mysql)), (Some(true), Some(false)));
    }
}
