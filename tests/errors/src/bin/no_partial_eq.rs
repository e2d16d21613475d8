//~ error[E0369]: binary operation `!=` cannot be applied to type `Odd`
//~ pub name: Odd,
//~ an implementation of `PartialEq` might be missing for `Odd`
use diesel::deserialize::{self, FromSql, FromSqlRow};
use diesel::expression::AsExpression;
use diesel::prelude::*;
use diesel::serialize::{self, Output, ToSql};
use diesel::sql_types::Text;
use diesel::sqlite::{Sqlite, SqliteValue};
use diesel_session::Entity;
use errors::schema::users;

#[derive(Debug, Clone, AsExpression, FromSqlRow)]
#[diesel(sql_type = Text)]
pub struct Odd(String);

impl ToSql<Text, Sqlite> for Odd {
    fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, Sqlite>) -> serialize::Result {
        <String as ToSql<Text, Sqlite>>::to_sql(&self.0, out)
    }
}

impl FromSql<Text, Sqlite> for Odd {
    fn from_sql(value: SqliteValue<'_, '_, '_>) -> deserialize::Result<Self> {
        <String as FromSql<Text, Sqlite>>::from_sql(value).map(Odd)
    }
}

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(table_name = users)]
pub struct User {
    pub id: i32,
    pub name: Odd,
}

fn main() {}
