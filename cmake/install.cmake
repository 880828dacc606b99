# What a package of fourmoe holds: the shared library, the headers, the CMake package and the pkg-config file.
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/fourmoe)
install(TARGETS fourmoe EXPORT fourmoe-targets LIBRARY)
install(DIRECTORY include/fourmoe DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT fourmoe-targets NAMESPACE fourmoe:: DESTINATION ${package_dir})

write_basic_package_version_file(fourmoe-config-version.cmake COMPATIBILITY SameMinorVersion)
configure_package_config_file(cmake/fourmoe-config.cmake.in fourmoe-config.cmake INSTALL_DESTINATION ${package_dir})
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/fourmoe-config.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/fourmoe-config-version.cmake DESTINATION ${package_dir})

# The prefix is reached from where the file lies, so that it may be chosen, or the folder moved, after the build.
set(pkgconfig_dir ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
file(RELATIVE_PATH FOURMOE_PREFIX_FROM_PKGCONFIG /prefix/${pkgconfig_dir} /prefix)
configure_file(cmake/fourmoe.pc.in fourmoe.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/fourmoe.pc DESTINATION ${pkgconfig_dir})
