//! Entry point of `krakectl`.

fn main() -> std::process::ExitCode {
    krake_cli::main()
}
