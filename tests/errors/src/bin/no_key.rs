//~ error: there is no field `id`; an entity has its key, which `#[diesel(primary_key(..))]` names
use diesel::prelude::*;
use diesel_session::Entity;
use errors::schema::users;

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(table_name = users)]
pub struct User {
    pub name: String,
}

fn main() {}
